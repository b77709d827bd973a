"""Metrics of the error as noise: of tensors of any shape, usually the denoiser's output. Computed in float64."""

from __future__ import annotations

import math

from torch import Tensor

from dq_plugins.metrics.metric import metric


@metric(higher_is_better=False)
def noise_power(reference: Tensor, output: Tensor) -> float:
    """Error power relative to the signal's, ``sum (y - y^)^2 / sum y^2``.

    Errors of independent sources add up in it, which decibels do not; so bit allocation minimises a sum of these.

    Returns:
        0 for equal tensors; infinite when only the reference is zero everywhere.
    """
    noise, signal = float((reference - output).square().sum()), float(reference.square().sum())
    return 0.0 if noise == 0 else noise / signal if signal > 0 else math.inf


@metric(higher_is_better=True)
def sqnr(reference: Tensor, output: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB, ``10 log10(sum y^2 / sum (y - y^)^2)``; infinite for equal tensors."""
    power = noise_power(reference, output)
    return math.inf if power == 0 else -math.inf if power == math.inf else -10 * math.log10(power)


@metric(higher_is_better=False)
def mse(reference: Tensor, output: Tensor) -> float:
    """Mean squared error."""
    return float((reference - output).square().mean())
