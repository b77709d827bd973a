"""The tensors of a checkpoint on disk: read from safetensors headers, checked before a value is used.

Only safetensors files are opened: a pickle can run code when it is read. Beside the tensors each file carries a record
of what was saved, with one hash of all tensors and one of the config, so that a truncated download, a shard of another
model and an edited config are found before they become wrong images. The hashes say that nothing changed by accident;
they are not a signature.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dq_plugins.artifact import STRICT, Format
from dq_plugins.artifact.format import METADATA_KEY
from dq_plugins.errors import CheckpointError, DQError
from dq_plugins.hashing import hash_in_order, hash_json, hash_tensors

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class StoredEntry(NamedTuple):
    """Where a tensor lies, and what it is."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointRecord:
    """What was saved.

    Attributes:
        state_hash: of all tensors, of all files.
        config_hash: of the JSON form of the quantization config.
        config: that form, unless another file holds it.
    """

    __pydantic_config__ = STRICT

    state_hash: str
    config_hash: str
    config: dict[str, Any] | None = None


RECORD: Format[CheckpointRecord] = Format(
    "quantized-denoiser", 3, CheckpointRecord, CheckpointError, "a record of a quantized denoiser", "Save it again."
)


def integrity_metadata(state: Mapping[str, Tensor], config: Any, *, carried: bool = False) -> dict[str, str]:
    """Metadata for the safetensors files of a checkpoint.

    Args:
        state: all tensors, of all files.
        config: the JSON form of the quantization config.
        carried: put the config itself into the metadata; otherwise it is saved beside the files.

    Raises:
        DQError: the denoiser has adapters, whose tensors a loaded one would have no place for.
    """
    if adapters := [name for name in state if ".lora_" in name or ".base_layer." in name]:
        raise DQError(
            f"the denoiser has LoRA adapters ({adapters[0]!r} and {len(adapters) - 1} other tensors), which are not "
            "part of a quantized checkpoint: save them with save_lora_adapter, unload them, and save again"
        )
    record = CheckpointRecord(hash_tensors(state), hash_json(config), config if carried else None)
    return {METADATA_KEY: RECORD.to_text(record).decode()}


def check_readable(files: Iterable[str | Path]) -> None:
    """Refuse files of full-precision weights that are missing, truncated, or no safetensors.

    Raises:
        CheckpointError: as said.
    """
    for file in files:
        with _opened(Path(file)):
            pass


class CheckpointFiles:
    """The tensors of one or several safetensors files, by name.

    Args:
        files: the files.

    Raises:
        CheckpointError: a file is missing, no safetensors, truncated, or holds an unknown dtype; two files hold the
            same tensor or different records.

    Attributes:
        entries: what is there, by name.
    """

    def __init__(self, files: Iterable[str | Path]) -> None:
        self.files = [Path(file) for file in files]
        self.entries: dict[str, StoredEntry] = {}
        records = {self._read_header(file) for file in self.files}
        if len(records) != 1:
            raise CheckpointError(f"the files {', '.join(f.name for f in self.files)} are not of one checkpoint")
        self._metadata = records.pop()

    def _read_header(self, path: Path) -> str | None:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                part = file.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise CheckpointError(
                        f"tensor {name!r} of {path} has dtype {part.get_dtype()}, which is not used here"
                    )
                if name in self.entries:
                    raise CheckpointError(f"tensor {name!r} is in {path} and in {self.entries[name].file}")
                self.entries[name] = StoredEntry(path, _DTYPES[part.get_dtype()], tuple(part.get_shape()))
            return (file.metadata() or {}).get(METADATA_KEY)

    def verify(self, config: Any) -> None:
        """Compare everything with what was saved.

        Args:
            config: the JSON form of the quantization config beside the files.

        Raises:
            CheckpointError: there is no record, it is of a newer format, or a hash differs.
        """
        record, where = self.record, self.files[0].parent
        if hash_json(config) != record.config_hash:
            raise CheckpointError(
                f"the quantization config in {where} does not belong to the tensors beside it, or was altered: its "
                "hash is not the one that the safetensors files name. Copy the whole folder again."
            )
        if hash_in_order((name, tensor) for name, tensor in self.tensors()) != record.state_hash:
            raise CheckpointError(
                f"the tensors in {where} are not those that were saved: their hash differs. The checkpoint is "
                "incomplete, damaged or altered; copy the whole folder again."
            )

    @property
    def full_precision(self) -> bool:
        """Whether these are plain weights: no record of a quantized denoiser, and no integer codes."""
        return self._metadata is None and all(entry.dtype.is_floating_point for entry in self.entries.values())

    @property
    def record(self) -> CheckpointRecord:
        """What was saved.

        Raises:
            CheckpointError: there is no record, it is damaged, or of another format.
        """
        where = self.files[0].parent
        if self._metadata is None:
            raise CheckpointError(
                f"the safetensors files in {where} carry no record of dq-plugins, but the config beside them says that "
                "the denoiser was quantized. They are of another model, or were written again by another tool."
            )
        return RECORD.of_text(self._metadata.encode(), f"the record in the safetensors files in {where}")

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Every tensor in the order of the names, one in memory at a time."""
        with ExitStack() as stack:
            opened = {path: stack.enter_context(_opened(path)) for path in self.files}
            for name in sorted(self.entries):
                yield name, _get(opened[self.entries[name].file], name)

    def check(self, expected: Mapping[str, Tensor]) -> None:
        """Compare names, shapes and dtypes with what a denoiser needs.

        Floating dtypes may differ from each other: a denoiser may have been cast before it was saved.

        Raises:
            CheckpointError: a tensor is missing, too many, or of another shape or kind.
        """
        where = self.files[0].parent
        for said, names in (
            ("lacks", sorted(set(expected) - set(self.entries))),
            ("holds unknown", sorted(set(self.entries) - set(expected))),
        ):
            if names:
                raise CheckpointError(
                    f"the checkpoint in {where} {said} {len(names)} tensors, the first is {names[0]!r}: it is "
                    "incomplete, or of another model than its config says"
                )
        for name, tensor in expected.items():
            _, dtype, shape = self.entries[name]
            same_kind = dtype == tensor.dtype or (dtype.is_floating_point and tensor.dtype.is_floating_point)
            if shape != tuple(tensor.shape) or not same_kind:
                raise CheckpointError(
                    f"tensor {name!r} of the checkpoint in {where} is {dtype} of shape {shape}; the denoiser needs "
                    f"{tensor.dtype} of shape {tuple(tensor.shape)}. It is damaged, or of another model."
                )


def _opened(path: Path) -> Any:
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} is not a safetensors file. Checkpoints of quantized denoisers are read from safetensors only: "
            "other formats are pickles, which can run code when read, and are not opened. Save the model again."
        )
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors: {error}. It is truncated, damaged, or another kind of file."
        ) from error


def _get(file: Any, name: str) -> Tensor:
    try:
        return file.get_tensor(name)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"tensor {name!r} cannot be read: {error}. The checkpoint is damaged.") from error
