"""The library that a denoiser comes from, and the adapter that knows it."""

from __future__ import annotations

from typing import Any

from torch import nn

from dq_plugins import registry


def library_adapter(denoiser: nn.Module) -> Any | None:
    """The registered adapter that goes by the name of the package a denoiser's class, or a base of it, comes from.

    So an adapter that executes plans need not know the libraries that denoisers come from.

    Returns:
        The adapter; None for a denoiser of no library that has one.

    Raises:
        MissingDependencyError: the adapter needs a package that is not installed.
    """
    known = registry.names("adapter")
    for base in type(denoiser).__mro__:
        library = base.__module__.partition(".")[0]
        if library in known:
            adapter = registry.get("adapter", library)
            return adapter() if isinstance(adapter, type) else adapter
    return None
