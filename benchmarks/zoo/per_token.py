"""Denoisers of diffusers called with one timestep for each token or frame, the first of which are given clean."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.zoo.image_transformers import IMAGE_TRANSFORMERS
from benchmarks.zoo.specimen import Inputs, Specimen
from benchmarks.zoo.video_transformers import VIDEO_TRANSFORMERS


def _times(*shape: int, clean: int, value: float = 500.0, axis: int = 1) -> Tensor:
    """Timesteps, 0 for the first ones along an axis."""
    found = torch.full(shape, value)
    found.narrow(axis, 0, clean).zero_()
    return found


def _with(specimen: Specimen, timestep: Tensor) -> Specimen:
    def inputs() -> Inputs:
        return specimen.inputs() | {"timestep": timestep.clone()}

    return replace(specimen, inputs=inputs)


PER_TOKEN: dict[str, Specimen] = {
    "CosmosTransformer3DModel, 5-D": _with(
        VIDEO_TRANSFORMERS["CosmosTransformer3DModel"], _times(2, 1, 2, 1, 1, clean=1, value=0.5, axis=2)
    ),
    "Ideogram4Transformer2DModel, per token": _with(
        IMAGE_TRANSFORMERS["Ideogram4Transformer2DModel"], _times(2, 6, clean=2, value=0.5)
    ),
    "LTXVideoTransformer3DModel, per token": _with(
        VIDEO_TRANSFORMERS["LTXVideoTransformer3DModel"], _times(2, 32, clean=16)
    ),
    "WanTransformer3DModel, per token": _with(VIDEO_TRANSFORMERS["WanTransformer3DModel"], _times(2, 32, clean=16)),
}
"""By class name and what is different."""
