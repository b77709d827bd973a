"""What the commands ask of the diffusers adapter: a pipeline from a folder, and its denoiser."""

from __future__ import annotations

from typing import Any

from torch import nn

from dq_plugins import registry


def diffusers_adapter() -> Any:
    """The registered diffusers adapter; a missing package raises with the pip line."""
    adapter = registry.get("adapter", "diffusers")
    return adapter() if isinstance(adapter, type) else adapter


def load_denoiser(folder: str) -> tuple[Any, nn.Module]:
    """Pipeline and denoiser of a folder, the denoiser in eval mode."""
    adapter = diffusers_adapter()
    pipeline = adapter.load_pipeline(folder)
    _, denoiser = adapter.denoiser_of(pipeline)
    return pipeline, denoiser.eval().requires_grad_(False)
