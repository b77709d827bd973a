"""What numbers a quantizer may have: checked where a decision is made, where a plan is read, where a checkpoint is.

Every function gives the fault as a clause, or the empty string. Dtype and shape come first: what follows computes with
the values, and a tensor of another dtype may not be able to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq_plugins.affine import integer_range

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
"""Of float32. Below it numbers lose digits, some kernels take them for 0, and their reciprocal overflows."""


def scale_fault(scale: Tensor, shape: tuple[int, ...] | None = None) -> str:
    """Whether factors are positive normal float32 numbers.

    Args:
        scale: scales or a balance.
        shape: that it must have; by default one dimension, with an entry at least.
    """
    if shape is None and (scale.dim() != 1 or not scale.numel()):
        return f"must have one dimension and an entry, got shape {tuple(scale.shape)}"
    if shape is not None and tuple(scale.shape) != shape:
        return f"must have the shape {shape}, got {tuple(scale.shape)}"
    if scale.dtype != torch.float32:
        return f"must be float32, got {scale.dtype}"
    if not bool((torch.isfinite(scale) & (scale >= SMALLEST_NORMAL)).all()):
        return f"must be positive, finite, and at least {SMALLEST_NORMAL:.3g}; found {_span(scale)}"
    return ""


def zero_point_fault(zero_point: Tensor, scale: Tensor, bits: int) -> str:
    """Whether zero points are int32, one for each scale, and codes of that many bits."""
    if zero_point.shape != scale.shape:
        return f"has shape {tuple(zero_point.shape)}, its scale {tuple(scale.shape)}"
    if zero_point.dtype != torch.int32:
        return f"must be int32, got {zero_point.dtype}"
    return code_fault(zero_point, bits)


def code_fault(codes: Tensor, bits: int) -> str:
    """Whether integers are codes of that many bits."""
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        return f"must be integers, got {codes.dtype}"
    low, high = integer_range(bits)
    if codes.numel() and bool(((codes < low) | (codes > high)).any()):
        return f"must lie in [{low}, {high}] at {bits} bits, found {_span(codes)}"
    return ""


def finite_fault(values: Tensor) -> str:
    """Whether values are finite float32 numbers."""
    if values.dtype != torch.float32:
        return f"must be float32, got {values.dtype}"
    return "" if bool(torch.isfinite(values).all()) else f"must be finite, found {_span(values)}"


def _span(values: Tensor) -> str:
    return f"{float(values.min()):.3g} to {float(values.max()):.3g}"
