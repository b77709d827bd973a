"""dq-plugins for diffusers: pipelines to record and quantize. diffusers itself is imported at first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "PixelClassConditionalPipeline": "pipelines",
    "PixelTextToImagePipeline": "pipelines",
    "install_schedule": "schedules",
    "load_pipeline": "recording",
    "planned_scheduler": "schedules",
    "quantize": "quantization",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name from its module at first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
