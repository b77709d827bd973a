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

import torch
from torch import Tensor


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
