"""The relaxation's forward: a weighted mixture of quantized versions of one tensor, with straight-through gradients.

    x^ = sum_g  w_g * Q(x; low_g, high_g)

``Q`` is the quantizer that executes (`dq_plugins.affine`). Rounding passes gradients straight through, as learned step
size quantization does (LSQ, Esser et al. 2020; LSQ+, Bhalgat et al. 2020, for both ends):

    inside:  d Q / d high = (round(x / s) - x / s) / n,  d Q / d low = -(the same),  d Q / d x = 1
    above:   d Q / d high = 1          below:  d Q / d low = 1

with n the number of steps of the code. Only x is kept for the backward pass: a mixture of eight versions of every
activation of a denoiser would not fit in memory otherwise.

Source: ADP-DM (Wang et al. 2024), the relaxed group assignment.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dq_plugins.affine import affine_parameters, integer_range, quantize

NEGLIGIBLE = 1e-3  # versions with less weight than this are left out: their share is below what rounding does


def mixture(x: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> Tensor:
    """Mix G quantized versions of ``x``.

    Args:
        x: any shape.
        weights: ``[G, ...]``; each entry of dimension 0 broadcasts against ``x``.
        low: lower clip bounds ``[G, ...]``, likewise.
        high: upper clip bounds, the shape of ``low``.
        bits: width of the code.
        symmetric: whether the zero point is fixed at 0.

    Returns:
        The shape of ``x``. Differentiable in everything but ``bits``.
    """
    return _Mixture.apply(x, weights, low, high, bits, symmetric)


def _versions(
    x: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """Of every version that counts: its index, its values, scale, and where ``x`` lies above and below the range."""
    q_min, q_max = integer_range(bits)
    scale, zero_point = affine_parameters(low, high, bits, symmetric=symmetric)
    for g in range(len(weights)):
        if float(weights[g].max()) < NEGLIGIBLE:
            continue
        s, z = scale[g], zero_point[g]
        codes = quantize(x.float(), s, z, q_min, q_max)
        yield g, (codes - z) * s, s, x > (q_max + 0.5 - z) * s, x < (q_min - 0.5 - z) * s


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
        ctx.save_for_backward(x, weights, low, high)
        ctx.bits, ctx.symmetric = bits, symmetric
        total = torch.zeros_like(x, dtype=torch.float32)
        for g, values, *_ in _versions(x, weights, low, high, bits, symmetric):
            total += weights[g] * values
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, low, high = ctx.saved_tensors
        (grad,) = grads
        q_min, q_max = integer_range(ctx.bits)
        of_x = torch.zeros_like(x, dtype=torch.float32)
        of_weights, of_low, of_high = (torch.zeros_like(p) for p in (weights, low, high))
        for g, values, scale, above, below in _versions(x, weights, low, high, ctx.bits, ctx.symmetric):
            of_weights[g] = (grad * values).sum_to_size(weights[g].shape)
            weighted = grad * weights[g]
            clipped_high, clipped_low = weighted * above, weighted * below
            inside = weighted - clipped_high - clipped_low
            of_x += inside
            # (round(x / s) - x / s) / n = (Q(x) - x) / (s n), and s n is the width of the range
            step = (inside * (values - x) / (scale * (q_max - q_min))).sum_to_size(low[g].shape)
            of_high[g] = clipped_high.sum_to_size(high[g].shape) + step
            of_low[g] = clipped_low.sum_to_size(low[g].shape) - step
        return of_x.to(x.dtype), of_weights, of_low, of_high, None, None
