"""How much memory a computation may take beside a denoiser: as it likes for small ones, a share of a large one."""

from __future__ import annotations

from torch import nn

LARGE = 1 << 30
"""Bytes of weights from which a denoiser is large."""

SHARE = 16
"""A part of a computation takes at most one part in so many of a large denoiser's weights."""


def weight_bytes(denoiser: nn.Module) -> int:
    """Bytes of its parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in denoiser.parameters())


def is_large(denoiser: nn.Module) -> bool:
    """Whether a second copy of its weights, or something of that order, is too much."""
    return weight_bytes(denoiser) >= LARGE


def allowance(denoiser: nn.Module, most: int) -> int:
    """Bytes that a part of a computation may take beside the denoiser: ``most``, less for a large one."""
    return min(most, weight_bytes(denoiser) // SHARE) if is_large(denoiser) else most
