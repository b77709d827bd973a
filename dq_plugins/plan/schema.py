"""The file format of a plan, as validated records. Tensors lie beside it, by name.

Tensor names: ``layers/<fqn>/weight.scale``, ``.../weight.zero_point``, ``.../weight.codes``,
``.../activation.scale``, ``.../activation.zero_point`` and ``sections/<pass>/<name>``.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT_VERSION = 2
"""Written; 1 is read too, which had no ``sampling``."""


class Record(BaseModel):
    """Base: unknown fields are errors, so that a typo or a foreign file never passes as a plan."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class WeightRecord(Record):
    """A weight quantizer on disk."""

    bits: int = Field(ge=1, le=16)
    symmetric: bool
    learned_rounding: bool
    scheme: Literal["affine", "binary"]


class ActivationRecord(Record):
    """An activation quantizer on disk."""

    bits: int = Field(ge=1, le=16)
    groups: str


class LayerRecord(Record):
    """One layer on disk."""

    kind: str
    roles: list[str]
    weight: WeightRecord | None
    activation: ActivationRecord | None
    kept: str | None


class GroupsRecord(Record):
    """Timestep groups on disk; an unbounded side is null (JSON has no infinity)."""

    edges: list[float]
    low: float | None
    high: float | None


class SectionRecord(Record):
    """A pass's section on disk."""

    data: dict[str, Any]
    tensors: list[str]
    critical: bool


class PassRecordOnDisk(Record):
    """A pass that ran."""

    name: str
    options: dict[str, Any]


class PlanRecord(Record):
    """The whole of ``plan.json``."""

    format_version: int
    model: str
    model_hash: str
    timestep_argument: str
    schedule: list[float] = Field(min_length=1)
    sampling: list[float] | None = Field(None, min_length=1)
    groups: dict[str, GroupsRecord]
    layers: dict[str, LayerRecord]
    sections: dict[str, SectionRecord]
    passes: list[PassRecordOnDisk]
    recipe: str
    seed: int
    tensors_hash: str
