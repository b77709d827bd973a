"""The file format of a saved Brevitas model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dq_plugins.artifact import STRICT, Format, StoredTensor
from dq_plugins.errors import DQError
from dq_plugins.timesteps import TimestepGroups


@dataclass(frozen=True)
class ModelRecord:
    """The state of a model, and what it is for."""

    __pydantic_config__ = STRICT

    model: str
    timestep_argument: str | None
    out_of_range: Literal["error", "nearest"] | None
    groups: dict[str, TimestepGroups]
    widths: dict[str, dict[Literal["weight", "input"], int | None]]
    state: dict[str, StoredTensor]


MODEL: Format[ModelRecord] = Format(
    "brevitas-model", 2, ModelRecord, DQError, "a Brevitas model", "Save the model again."
)
