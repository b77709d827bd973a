"""The sign of a weight, and its gradient.

A binary weight has two values, so zero needs a side: ``sign(0) = +1`` everywhere, which is also the bit that
`dq_plugins.quantized.packing` stores.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sign(x: Tensor) -> Tensor:
    """+1 where ``x >= 0`` and -1 elsewhere, in ``x.dtype``, without a gradient."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def sign_ste(x: Tensor, clip: float = 1.0) -> Tensor:
    """`sign` with the clipped straight-through gradient: 1 where ``|x| <= clip``, else 0.

    Source: Hubara et al., "Binarized Neural Networks" (2016), equation 4; BinaryDM, section 3.1.

    The gradient travels in a term that is exactly zero (``c - c.detach()``), so the value is the sign bit for bit,
    and neither ``torch.compile`` nor ``torch.export`` meets a custom autograd function.
    """
    passed = x.clamp(-clip, clip)
    return sign(x) + (passed - passed.detach())
