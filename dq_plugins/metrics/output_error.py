"""Error of the denoiser's output per timestep, on recorded full-precision calls.

Sums are accumulated in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dq_plugins.calibration import CalibrationSet


@dataclass(frozen=True)
class OutputError:
    """Power of the output and of its error at one timestep, summed over calls.

    Attributes:
        signal: ``sum y^2``.
        noise: ``sum (y^ - y)^2``.
        drift: what of the noise is the mean error of a channel, the same in every image. A sampler adds it up step by
            step, in amplitude; the rest adds up in power.
    """

    signal: float
    noise: float
    drift: float

    @property
    def sqnr(self) -> float:
        """``10 log10(signal / noise)`` in dB; infinite without noise."""
        return _decibel(self.signal, self.noise)

    @property
    def drift_below_signal(self) -> float:
        """``10 log10(signal / drift)`` in dB; infinite without drift."""
        return _decibel(self.signal, self.drift)


def _decibel(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else math.inf


@torch.no_grad()
def output_errors(denoiser: nn.Module, calls: CalibrationSet) -> dict[float, OutputError]:
    """Error of the output by timestep, ascending; the calls are those of `output_sqnr`."""
    found = {}
    for t in calls.timesteps:
        signal = noise = values = 0.0
        mean: Tensor | float = 0.0  # [C], float64: sum of the errors of a channel over calls, images and positions
        for call in calls.calls(t):
            reference = call.output.double()
            difference = call.run(denoiser).double().to(reference.device) - reference
            channels = difference.movedim(1 if difference.dim() > 3 else -1, 0).flatten(1)  # [C, images * positions]
            signal += float(reference.square().sum())
            noise += float(channels.square().sum())
            mean, values = mean + channels.sum(1), values + channels.shape[1]
        drift = float((torch.as_tensor(mean) / max(values, 1)).square().sum()) * values
        found[t] = OutputError(signal, noise, drift)
    return found


def output_sqnr(denoiser: nn.Module, calls: CalibrationSet) -> dict[float, float]:
    """Signal-to-quantization-noise ratio of the output, per timestep.

    Every recorded call is repeated with its recorded inputs, so errors of earlier steps do not add up: this is the
    error that one step makes.

    Args:
        denoiser: the quantized denoiser.
        calls: recorded full-precision calls, best not those it was calibrated on.

    Returns:
        ``10 log10(sum y^2 / sum (y - y^)^2)`` in dB by timestep, ascending; infinite where the outputs are equal.
    """
    return {t: error.sqnr for t, error in output_errors(denoiser, calls).items()}
