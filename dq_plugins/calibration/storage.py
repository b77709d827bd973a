"""Tensors of a calibration set on disk: safetensors shards and the manifest that vouches for them.

Every file is written beside its place and renamed into it, shards before the manifest that names them, so a folder
is readable after an interruption at any moment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from dq_plugins.artifact import Format
from dq_plugins.artifact.files import check_place, read_tensors
from dq_plugins.atomic import write_atomically
from dq_plugins.calibration.schema import Manifest, ShardRecord
from dq_plugins.errors import CalibrationError

MANIFEST_NAME = "manifest.json"
START_OVER = "start over with overwrite=True (--overwrite on the command line)"
WAY_OUT = f"Restore the folder from a copy, or {START_OVER}."
MANIFEST: Format[Manifest] = Format("calibration", 4, Manifest, CalibrationError, "a calibration manifest", WAY_OUT)


def write_shard(folder: Path, number: int, tensors: Mapping[str, Tensor]) -> ShardRecord:
    """Write tensors, named by content hash, as one shard, which is named by its own.

    Two processes that record into one folder fill their shards differently, and the manifest that is written last must
    find its own.
    """
    data = safetensors.torch.save(dict(tensors))
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"shard-{number:05d}-{sha256[:12]}.safetensors"
    write_atomically(folder / name, data)
    return ShardRecord(file=name, size=len(data), sha256=sha256, tensors=list(tensors))


def read_manifest(folder: Path) -> Manifest:
    """Read and validate ``manifest.json``.

    Raises:
        CalibrationError: it is absent, damaged, or of another format.
    """
    if not (folder / MANIFEST_NAME).exists():
        raise CalibrationError(
            f"{folder} is not a calibration set: it has no {MANIFEST_NAME}. Record one with dq_plugins.record or "
            "`dq-plugins record`."
        )
    return MANIFEST.read(folder / MANIFEST_NAME)


def check_shards(folder: Path, manifest: Manifest, *, content: bool = True) -> None:
    """Check that every shard is present and whole, and that every call's tensors are in one.

    Args:
        folder: the calibration set.
        manifest: what it should hold.
        content: also read every byte and compare the hash.

    Raises:
        CalibrationError: a shard is missing, cut short, or altered.
    """
    for shard in manifest.shards:
        path = folder / shard.file
        try:
            check_place(path)
        except ValueError as error:
            raise CalibrationError(f"{error}; the manifest beside it names it. {WAY_OUT}") from error
        if path.stat().st_size != shard.size:
            raise CalibrationError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {shard.size}: it is truncated or was "
                f"replaced. {WAY_OUT}"
            )
        if content and file_sha256(path) != shard.sha256:
            raise CalibrationError(f"{path} was altered: its sha256 differs from the manifest's. {WAY_OUT}")


def file_sha256(path: Path) -> str:
    """sha256 of a file, read a piece at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


class ShardReader:
    """Tensors by content hash, each read from disk when it is asked for; shards are mapped, not loaded."""

    def __init__(self, folder: Path, shards: list[ShardRecord]) -> None:
        self.folder = folder
        self._shard_of = {key: shard.file for shard in shards for key in shard.tensors}
        self._open: dict[str, dict[str, Tensor]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._shard_of

    def get(self, key: str) -> Tensor:
        """A fresh copy of the tensor with this content hash.

        Raises:
            CalibrationError: no shard has it.
        """
        name = self._shard_of.get(key)
        if name is None:
            raise CalibrationError(f"{self.folder}: no shard holds tensor {key[:12]}; the manifest is damaged")
        try:
            if name not in self._open:
                self._open[name] = read_tensors(self.folder / name, mapped=True)[1]
            # Cloned into aligned memory: on the mapped file's alignment some CPU kernels round differently.
            return self._open[name][key].clone()
        except (ValueError, KeyError, OSError) as error:
            raise CalibrationError(f"tensor {key[:12]} cannot be read: {error}. {WAY_OUT}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}
