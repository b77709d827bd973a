"""What the core asks of diffusers, through the registry: a denoiser from its config, and example inputs for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dq_plugins.progress import on_terminal


class DiffusersAdapter:
    """Builds denoisers from diffusers configs without weights, and knows what their forwards take."""

    name = "diffusers"

    def build_from_config(self, path: str | Path) -> nn.Module:
        """A denoiser on the meta device; see `dq_diffusers.building.build_from_config`."""
        from dq_diffusers.building import build_from_config

        return build_from_config(path)

    def example_inputs(self, model: nn.Module, **sizes: Any) -> dict[str, Any]:
        """Arguments of one call of a diffusers denoiser; see `dq_diffusers.example_inputs.example_inputs`."""
        from dq_diffusers.example_inputs import example_inputs

        return example_inputs(model, **sizes)

    def load_pipeline(self, path: str | Path) -> Any:
        """A saved pipeline, in full precision; see `dq_diffusers.recording.load_pipeline`.

        Off a terminal the progress bars of loading are not shown.
        """
        from dq_diffusers.quiet import loading_bars
        from dq_diffusers.recording import load_pipeline

        with loading_bars(shown=on_terminal()):
            return load_pipeline(path)

    def save_pipeline(self, pipe: Any, denoiser: nn.Module, folder: str | Path) -> Path | None:
        """Save a pipeline with a quantized denoiser in the place of its own.

        Returns:
            The folder; None, with nothing written, where the backend's denoiser cannot be saved by diffusers.
        """
        if getattr(denoiser, "hf_quantizer", None) is None:
            return None
        attribute, _ = self.denoiser_of(pipe)
        setattr(pipe, attribute, denoiser)
        pipe.save_pretrained(folder)
        return Path(folder)

    def make_savable(self, denoiser: nn.Module, config: Any) -> None:
        """Let ``save_pretrained`` write a quantized denoiser; see `dq_diffusers.quantizer.make_savable`."""
        from dq_diffusers.quantizer import make_savable

        make_savable(denoiser, config)

    def denoiser_of(self, pipe: Any) -> tuple[str, nn.Module]:
        """Attribute name and module of a pipeline's denoiser; see `dq_diffusers.recording.denoiser_of`."""
        from dq_diffusers.recording import denoiser_of

        return denoiser_of(pipe)

    def stepper(self, description: dict[str, Any]) -> Any:
        """The sampler that a recording describes, over any timesteps; see `dq_diffusers.stepping`."""
        from dq_diffusers.stepping import DiffusersStepper

        return DiffusersStepper(description["scheduler"], description.get("guidance"))

    def sampler(self, pipe: Any, **options: Any) -> Any:
        """A repeatable sampler for `dq_plugins.record`; see `dq_diffusers.recording.sampler`."""
        from dq_diffusers.recording import sampler

        return sampler(pipe, **options)
