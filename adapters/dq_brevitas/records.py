"""The file format of a saved Brevitas model, as validated records."""

from __future__ import annotations

from typing import Literal

from dq_plugins.plan.schema import GroupsRecord, Record


class ModelRecord(Record):
    """``model.json``: what the tensors in ``model.safetensors`` are for."""

    format_version: Literal[1]
    model: str
    timestep_argument: str | None
    out_of_range: Literal["error", "nearest"] | None
    groups: dict[str, GroupsRecord]
    widths: dict[str, dict[Literal["weight", "input"], int | None]]
    state_hash: str
