"""The registered adapters, and those that know the library which a denoiser comes from."""

from __future__ import annotations

from typing import Any

from torch import nn

from dq_plugins import registry
from dq_plugins.errors import DQError


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


def load_denoiser(folder: str, component: str | None = None) -> tuple[Any, nn.Module]:
    """The diffusers pipeline in a folder and its denoiser, in eval mode and without gradients.

    Args:
        folder: of the pipeline.
        component: attribute name of the denoiser, where there are several.

    Raises:
        DQError: there is no such denoiser.
    """
    diffusers = adapter("diffusers")
    pipeline = diffusers.load_pipeline(folder)
    name = component or diffusers.denoiser_of(pipeline)[0]
    found = diffusers.denoisers_of(pipeline)
    if name not in found:
        raise DQError(f"{folder} has no denoiser {name!r}; it has {', '.join(found)}")
    return pipeline, found[name].eval().requires_grad_(False)
