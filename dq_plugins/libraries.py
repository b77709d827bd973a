"""The registered adapters, and those that know the library which a denoiser comes from."""

from __future__ import annotations

from typing import Any

from torch import nn

from dq_plugins import registry


def adapter(name: str) -> Any:
    """A registered adapter, made where a class is registered; a missing package raises with the pip line."""
    found = registry.get("adapter", name)
    return found() if isinstance(found, type) else found


def library_adapter(denoiser: nn.Module) -> Any | None:
    """The registered adapter that goes by the name of the package a denoiser's class, or a base of it, comes from.

    So an adapter that executes plans need not know the libraries that denoisers come from.

    Returns:
        The adapter; None for a denoiser of no library that has one.

    Raises:
        MissingDependencyError: the adapter needs a package that is not installed.
    """
    known = registry.names("adapter")
    libraries = (base.__module__.partition(".")[0] for base in type(denoiser).__mro__)
    return next((adapter(library) for library in libraries if library in known), None)


def load_denoiser(folder: str) -> tuple[Any, nn.Module]:
    """The diffusers pipeline in a folder and its denoiser, in eval mode and without gradients."""
    diffusers = adapter("diffusers")
    pipeline = diffusers.load_pipeline(folder)
    _, denoiser = diffusers.denoiser_of(pipeline)
    return pipeline, denoiser.eval().requires_grad_(False)
