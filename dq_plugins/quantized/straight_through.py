"""Quantizers with straight-through gradients: rounding passes them unchanged, clipping stops them.

    inside:   d x^ / d x = 1,   d x^ / d s = round(x / s) - x / s
    clipped:  d x^ / d x = 0,   d x^ / d s = the code it is clipped to, less the zero point

Values are those of `dq_plugins.affine`, bit for bit.

Source: Bengio et al. 2013 (straight-through estimator); Esser et al., "Learned Step Size Quantization" (ICLR 2020),
section 2.1, for the gradient of the scale.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_ste(x: Tensor) -> Tensor:
    """Round to nearest, ties to even; the gradient passes unchanged. The value is exact."""
    return torch.round(x).detach() + (x - x.detach())


def fake_quantize_ste(x: Tensor, scale: Tensor, zero_point: Tensor | int, q_min: int, q_max: int) -> Tensor:
    """`dq_plugins.affine.fake_quantize`, differentiable in ``x`` and ``scale``."""
    ratio = x.float() * (1.0 / scale)
    lowest, highest = q_min - zero_point, q_max - zero_point
    if isinstance(zero_point, Tensor):
        ratio = torch.minimum(torch.maximum(ratio, lowest.to(ratio)), highest.to(ratio))
    else:
        ratio = ratio.clamp(lowest, highest)
    return (round_ste(ratio) * scale).to(x.dtype)
