"""Metrics: ``metric(reference, output) -> float`` with a ``higher_is_better`` (plugins of kind ``metric``)."""

from dq_plugins.metrics.image import psnr, ssim
from dq_plugins.metrics.metric import Metric, metric
from dq_plugins.metrics.noise import mse, noise_power, sqnr

__all__ = ["Metric", "metric", "mse", "noise_power", "psnr", "sqnr", "ssim"]
