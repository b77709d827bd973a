"""What the core asks of diffusers, through the registry: a denoiser from its config, and example inputs for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn


class DiffusersAdapter:
    """Builds denoisers from diffusers configs without weights, and knows what their forwards take."""

    name = "diffusers"

    def build_from_config(self, path: str | Path) -> nn.Module:
        """A denoiser on the meta device; see `dq_diffusers.config.build_from_config`."""
        from dq_diffusers.config import build_from_config

        return build_from_config(path)

    def example_inputs(self, model: nn.Module, **sizes: Any) -> dict[str, Any]:
        """Arguments of one call of a diffusers denoiser; see `dq_diffusers.example_inputs.example_inputs`."""
        from dq_diffusers.example_inputs import example_inputs

        return example_inputs(model, **sizes)
