"""The file format of a calibration set, as validated records.

A calibration set is a folder: ``manifest.json`` (a `Manifest`) and ``shard-00000-HASH.safetensors``, ... Tensors are
named by the hash of their content, so a tensor that repeats (text embeddings, the timestep) is stored once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictBool, StrictFloat, StrictInt, StrictStr


class Record(BaseModel):
    """Base: unknown fields are errors, so that a foreign or damaged file never passes as a calibration set."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorNode(Record):
    """A tensor, by the hash of its content."""

    kind: Literal["tensor"] = "tensor"
    key: str = Field(pattern="^[0-9a-f]{64}$")


class ValueNode(Record):
    """A plain value."""

    kind: Literal["value"] = "value"
    value: StrictBool | StrictInt | StrictFloat | StrictStr | None


class SequenceNode(Record):
    """A list or a tuple."""

    kind: Literal["list", "tuple"]
    items: list[Node]


class MappingNode(Record):
    """A dictionary with string keys, or the fields of an output class (``module:qualified name``)."""

    kind: Literal["dict"] = "dict"
    items: dict[str, Node]
    output_class: str | None = None


Node = Annotated[TensorNode | ValueNode | SequenceNode | MappingNode, Field(discriminator="kind")]


class CallRecord(Record):
    """One denoiser call: its timestep (one value, or one per sample), arguments and output."""

    timesteps: list[float] = Field(min_length=1)
    inputs: dict[str, Node]
    output: Node


class ShardRecord(Record):
    """One file of tensors: its size in bytes, sha256, and the keys of its tensors."""

    file: str = Field(pattern=r"^shard-\d{5}-[0-9a-f]{12}\.safetensors$")
    size: int = Field(ge=0)
    sha256: str
    tensors: list[str]


class Manifest(Record):
    """The record of ``manifest.json``; ``sampler`` says what called the denoiser, where that was told."""

    complete: bool
    model: str
    model_hash: str
    timestep_argument: str
    schedules: list[list[float]]
    shards: list[ShardRecord]
    calls: list[CallRecord]
    sampler: dict[str, JsonValue] | None = None


for _record in (SequenceNode, MappingNode, CallRecord, Manifest):
    _record.model_rebuild()
