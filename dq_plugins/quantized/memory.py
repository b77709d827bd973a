"""Which denoisers are large: beside these, computations keep no second copy of the weights."""

from __future__ import annotations

from torch import nn

LARGE = 1 << 30
"""Bytes of weights from which a denoiser is large."""


def weight_bytes(denoiser: nn.Module) -> int:
    """Bytes of its parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in denoiser.parameters())


def is_large(denoiser: nn.Module) -> bool:
    """Whether a second copy of its weights, or something of that order, is too much."""
    return weight_bytes(denoiser) >= LARGE
