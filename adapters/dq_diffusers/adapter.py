"""What the core asks of diffusers, through the registry: denoisers, example inputs for them, pipelines, samplers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dq_diffusers.building import build_from_config
from dq_diffusers.denoisers import denoiser_of, denoisers_of, place
from dq_diffusers.example_inputs import example_inputs
from dq_diffusers.host import loading_bars
from dq_diffusers.recording import load_pipeline, sampler
from dq_plugins.progress import on_terminal


class DiffusersAdapter:
    """Builds denoisers from diffusers configs without weights, knows what they take, and samples with pipelines."""

    name = "diffusers"
    build_from_config = staticmethod(build_from_config)
    example_inputs = staticmethod(example_inputs)
    denoiser_of = staticmethod(denoiser_of)
    denoisers_of = staticmethod(denoisers_of)
    sampler = staticmethod(sampler)

    def load_pipeline(self, path: str | Path) -> Any:
        """`dq_diffusers.recording.load_pipeline`; off a terminal the progress bars of loading are not shown."""
        with loading_bars(shown=on_terminal()):
            return load_pipeline(path)

    def save_pipeline(self, pipe: Any, denoisers: Mapping[str, nn.Module], folder: str | Path) -> Path | None:
        """Save a pipeline with quantized denoisers in the place of its own, by attribute name.

        Returns:
            The folder; None, with nothing written, where a backend's denoiser cannot be saved by diffusers.
        """
        if any(getattr(denoiser, "hf_quantizer", None) is None for denoiser in denoisers.values()):
            return None
        for name, denoiser in denoisers.items():
            place(pipe, name, denoiser)
        pipe.save_pretrained(folder)
        return Path(folder)

    def forget_adapters(self, denoiser: nn.Module) -> None:
        """The LoRA adapters of a denoiser have been merged: it is one without."""
        if hasattr(denoiser, "_hf_peft_config_loaded"):
            denoiser._hf_peft_config_loaded = None  # type: ignore[assignment]

    def make_savable(self, denoiser: nn.Module, config: Any) -> None:
        """Let ``save_pretrained`` write a quantized denoiser; see `dq_diffusers.quantizer.make_savable`."""
        from dq_diffusers.quantizer import make_savable  # needs torchao

        make_savable(denoiser, config)

    def stepper(self, description: dict[str, Any]) -> Any:
        """The sampler that a recording describes, over any timesteps; see `dq_diffusers.stepping`."""
        from dq_diffusers.stepping import DiffusersStepper  # imports every scheduler

        return DiffusersStepper(description["scheduler"], description.get("guidance"))

    def step_responses(self, description: dict[str, Any], timesteps: Sequence[float]) -> list[tuple[float, float]]:
        """What a step makes of its output, and the noise that it adds; see `dq_diffusers.correcting`."""
        from dq_diffusers.correcting import step_responses

        return step_responses(description["scheduler"], timesteps)
