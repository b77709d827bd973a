"""The file format of a calibration set, as validated records.

A calibration set is a folder: ``manifest.json`` (a `Manifest`) and ``shard-00000-HASH.safetensors``, ... Tensors are
named by the hash of their content, so a tensor that repeats (text embeddings, the timestep) is stored once.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, model_validator
from typing_extensions import Self

from dq_plugins.artifact.envelope import Digest
from dq_plugins.calibration.call_records import check_description, tensor_keys

Description = Annotated[JsonValue, AfterValidator(check_description)]
"""A value of a call, as `call_records` describes it."""


class Record(BaseModel):
    """Base: unknown fields are errors, so that a foreign or damaged file never passes as a calibration set."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CallRecord(Record):
    """One denoiser call: its timestep (one value, or one per sample), and what `call_records` says of its values.

    Where tokens have timesteps of their own, that of a sample is the largest of its tokens', and ``token_timesteps``
    holds all distinct ones.
    """

    timesteps: list[FiniteFloat] = Field(min_length=1)
    inputs: dict[str, Description]
    output: Description
    token_timesteps: list[FiniteFloat] = []

    @property
    def distinct(self) -> list[float]:
        """Every timestep that something in the call has, ascending."""
        return sorted({*self.timesteps, *self.token_timesteps})


class ShardRecord(Record):
    """One file of tensors: its size in bytes, sha256, and the keys of its tensors."""

    file: str = Field(pattern=r"^shard-\d{5}-[0-9a-f]{12}\.safetensors$")
    size: int = Field(ge=0)
    sha256: Digest
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

    @model_validator(mode="after")
    def _every_tensor_has_a_shard(self) -> Self:
        held = {key for shard in self.shards for key in shard.tensors}
        for index, call in enumerate(self.calls):
            output = list(tensor_keys(call.output))
            if not output:
                raise ValueError(f"the output of call {index} has no tensor")
            for key in (*output, *(key for node in call.inputs.values() for key in tensor_keys(node))):
                if key not in held:
                    raise ValueError(f"call {index} has a tensor {key[:12]!r}, which is in no shard")
        return self
