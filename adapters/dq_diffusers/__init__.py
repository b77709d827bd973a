"""dq-plugins for diffusers: pipelines to record and quantize, and diffusers' quantization method ``dq``.

Importing this package is what lets ``from_pretrained`` read quantized denoisers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dq_plugins.errors import require

require("diffusers", "diffusers", "use dq_diffusers")

from dq_diffusers.registration import register  # noqa: E402

register()

_HOME = {
    "DQConfig": "config",
    "correct_sampler": "correcting",
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
