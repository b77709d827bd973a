"""Quantizers with straight-through gradients: rounding passes them unchanged, clipping stops them.

    inside:   d x^ / d x = 1,   d x^ / d s = round(x / s) - x / s
    clipped:  d x^ / d x = 0,   d x^ / d s = the code it is clipped to, less the zero point,   d x^ / d z = -s

Values are those of `dq_plugins.affine`, bit for bit.

A binary weight has two values, so zero needs a side: ``sign(0) = +1`` everywhere, which is also the bit that
`dq_plugins.quantized.packing` stores.

Source: Bengio et al. 2013 (straight-through estimator); Esser et al., "Learned Step Size Quantization" (ICLR 2020),
section 2.1, for the gradient of the scale; Bhalgat et al. 2020 (LSQ+) for that of the zero point.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dq_plugins.affine import fake_quantize


def round_ste(x: Tensor) -> Tensor:
    """Round to nearest, ties to even; the gradient passes unchanged. The value is exact."""
    return torch.round(x).detach() + (x - x.detach())


def fake_quantize_ste(x: Tensor, scale: Tensor, zero_point: Tensor | int, q_min: int, q_max: int) -> Tensor:
    """`dq_plugins.affine.fake_quantize`, differentiable in ``x``, ``scale`` and a floating ``zero_point``."""
    ratio = x.float() * (1.0 / scale)
    lowest, highest = q_min - zero_point, q_max - zero_point
    if isinstance(zero_point, Tensor):
        ratio = torch.minimum(torch.maximum(ratio, lowest.to(ratio)), highest.to(ratio))
    else:
        ratio = ratio.clamp(lowest, highest)
    return (round_ste(ratio) * scale).to(x.dtype)


class FakeQuantize(torch.autograd.Function):
    """`fake_quantize_ste` that keeps its input and its value alone for the backward pass, and little work to do there.

    With G the incoming gradient and M where x is not clipped,

        d x = G M,    d s = sum(G x^ - G M x) / s,    d z = - s sum(G - G M)

    For eager code: `fake_quantize_ste` is for what is compiled.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, q_min: int, q_max: int) -> Tensor:
        """See `fake_quantize_ste`; ``scale`` and ``zero_point`` broadcast against ``x``."""
        value = fake_quantize(x, scale, zero_point, q_min, q_max)
        ctx.save_for_backward(x, scale, zero_point, value)
        ctx.codes = q_min, q_max
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, scale and zero point, where they are wanted."""
        (grad,), (x, scale, zero_point, value) = grads, ctx.saved_tensors
        (q_min, q_max), wanted = ctx.codes, ctx.needs_input_grad
        ratio = x.float() * (1.0 / scale)
        inside = (ratio >= q_min - zero_point) & (ratio <= q_max - zero_point)
        passed = grad * inside
        of_scale = of_zero_point = None
        if wanted[1]:
            of_scale = ((grad * value - passed * x).float() / scale).sum_to_size(scale.shape)
        if wanted[2]:
            of_zero_point = ((passed - grad).float() * scale).sum_to_size(zero_point.shape)
        return passed if wanted[0] else None, of_scale, of_zero_point, None, None


class RoundThrough(torch.autograd.Function):
    """`fake_quantize` of values that nothing cuts off: the gradient passes unchanged, and nothing is kept for it.

    As ``x + (x^ - x).detach()``, without two more passes over memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, q_min: int, q_max: int) -> Tensor:
        """``scale`` and ``zero_point`` broadcast against ``x``; they get no gradients."""
        return fake_quantize(x, scale, zero_point, q_min, q_max)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x."""
        return grads[0], None, None, None, None


def sign(x: Tensor) -> Tensor:
    """+1 where ``x >= 0`` and -1 elsewhere, in ``x.dtype``, without a gradient."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def sign_ste(x: Tensor, clip: float = 1.0) -> Tensor:
    """`sign` with the clipped straight-through gradient: 1 where ``|x| <= clip``, else 0.

    The gradient travels in a term that is exactly zero (``c - c.detach()``), so the value is the sign bit for bit,
    and neither ``torch.compile`` nor ``torch.export`` meets a custom autograd function.

    Source: Hubara et al., "Binarized Neural Networks" (2016), equation 4; BinaryDM, section 3.1.
    """
    passed = x.clamp(-clip, clip)
    return sign(x) + (passed - passed.detach())
