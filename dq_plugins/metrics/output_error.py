"""Error of the denoiser's output per timestep, on recorded full-precision calls.

Sums of squares are accumulated in float64.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from dq_plugins.calibration import CalibrationSet


@torch.no_grad()
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
    sqnr = {}
    for t in calls.timesteps:
        signal = noise = 0.0
        for call in calls.calls(t):
            reference = call.output.double()
            difference = reference - call.run(denoiser).double().to(reference.device)
            signal += float(reference.square().sum())
            noise += float(difference.square().sum())
        sqnr[t] = 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else math.inf
    return sqnr
