"""The error a quantizer makes on weighted values, for many candidate ranges at once.

Shapes: ``N`` weighted values, ``C`` candidate ranges, ``T`` timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dq_plugins.affine import affine_parameters, fake_quantize, integer_range

CHUNK = 1 << 16  # elements of a temporary: the quantizer's temporaries then stay in the cache


@dataclass(frozen=True)
class ErrorTable:
    """Errors of candidate ranges of one layer; the error of a group of timesteps is a sum of rows.

    Attributes:
        low: lower bounds of the candidates ``[C]``.
        high: upper bounds of the candidates ``[C]``.
        error: mean error per value at each timestep for each candidate, float64 ``[T, C]``.
        power: mean square of the layer's inputs over all timesteps; the scale that errors are compared by.
    """

    low: Tensor
    high: Tensor
    error: Tensor
    power: float


def range_errors(
    values: Tensor,
    weights: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int,
    *,
    symmetric: bool,
    power: float = 2.0,
) -> Tensor:
    """Mean of ``|x - x^|^power`` for every candidate range, with the quantizer that executes.

    Args:
        values: float32 ``[N]``.
        weights: how often each value occurs, ``[N]``.
        low: lower clip bounds ``[C]``.
        high: upper clip bounds ``[C]``.
        bits: width of the code.
        symmetric: whether the zero point is 0.
        power: p of the error norm.

    Returns:
        float64 ``[C]``.
    """
    q_min, q_max = integer_range(bits)
    scale, zero_point = affine_parameters(low, high, bits, symmetric=symmetric)  # [C] each
    share = weights.double() / weights.double().sum()  # [N]
    errors = torch.empty(low.numel(), dtype=torch.float64)
    step = max(1, CHUNK // max(values.numel(), 1))
    for c in range(0, low.numel(), step):
        s, z = scale[c : c + step, None], zero_point[c : c + step, None]  # [step, 1]
        error = fake_quantize(values, s, z, q_min, q_max).sub_(values)  # [step, N]
        error = error.square_() if power == 2 else error.abs_().pow_(power)
        errors[c : c + step] = error.double() @ share
    return errors
