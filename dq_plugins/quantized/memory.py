"""Which denoisers are large: beside these, computations keep no second copy of the weights."""

from __future__ import annotations

import ctypes
import sys

from torch import nn

from dq_plugins.artifact.files import Mapped

LARGE = 1 << 30
"""Bytes of weights from which a denoiser is large."""


def weight_bytes(denoiser: nn.Module) -> int:
    """Bytes of its parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in denoiser.parameters())


def is_large(denoiser: nn.Module) -> bool:
    """Whether a second copy of its weights, or something of that order, is too much."""
    return weight_bytes(denoiser) >= LARGE


def codes_where(denoiser: nn.Module) -> Mapped:
    """Where the codes of its weights are while it is planned: in files, if it is large.

    Windows does not let go of files that are mapped, so there they are in memory.
    """
    return "codes" if is_large(denoiser) and sys.platform != "win32" else False


def give_back() -> None:
    """Give free memory back to the system; glibc keeps what lies between blocks in use. For use beside large ones."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
