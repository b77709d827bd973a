"""Measure a quantized denoiser against the full-precision one: error, latency, size."""

from dq_plugins.evaluation.latency import Latency, compare_latency
from dq_plugins.evaluation.output_error import output_sqnr
from dq_plugins.evaluation.size import state_bytes

__all__ = ["Latency", "compare_latency", "output_sqnr", "state_bytes"]
