"""The file format of a saved Brevitas model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dq_plugins.plan.codec import STRICT
from dq_plugins.timesteps import TimestepGroups


@dataclass(frozen=True)
class ModelRecord:
    """``model.json``: what the tensors in ``model.safetensors`` are for."""

    __pydantic_config__ = STRICT

    format_version: Literal[1]
    model: str
    timestep_argument: str | None
    out_of_range: Literal["error", "nearest"] | None
    groups: dict[str, TimestepGroups]
    widths: dict[str, dict[Literal["weight", "input"], int | None]]
    state_hash: str
