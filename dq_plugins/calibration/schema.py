"""The file format of a calibration set, as validated records.

A calibration set is a folder: ``manifest.json`` (a `Manifest`) and ``shard-00000-HASH.safetensors``, ... Tensors are
named by the hash of their content, so a tensor that repeats (text embeddings, the timestep) is stored once.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, JsonValue


class Record(BaseModel):
    """Base: unknown fields are errors, so that a foreign or damaged file never passes as a calibration set."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CallRecord(Record):
    """One denoiser call: its timestep (one value, or one per sample), and what `call_records` says of its values."""

    timesteps: list[float] = Field(min_length=1)
    inputs: dict[str, JsonValue]
    output: JsonValue


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
