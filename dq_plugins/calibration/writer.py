"""Growing a calibration set call by call, so that an interruption loses seconds, not the recording."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dq_plugins.artifact.format import lock_name
from dq_plugins.calibration.call_records import tensor_keys
from dq_plugins.calibration.schedules import visited_schedules
from dq_plugins.calibration.schema import CallRecord, Manifest, ShardRecord
from dq_plugins.calibration.storage import (
    MANIFEST,
    MANIFEST_NAME,
    START_OVER,
    ShardReader,
    check_shards,
    read_manifest,
    write_shard,
)
from dq_plugins.errors import CalibrationError
from dq_plugins.exclusive import LOCK
from dq_plugins.hashing import weights_hash
from dq_plugins.scratch import is_scratch, remove_abandoned

SHARD_BYTES = 64 * 2**20
FLUSH_SECONDS = 30.0  # after so long at the latest
FREE_SECONDS = 0.02  # what writing after every call may take
FLUSH_SHARE = 0.05  # of the time that it may take where it takes longer
SHARDS = "shard-*.safetensors"


class CalibrationWriter:
    """Appends calls to a calibration set on disk.

    Args:
        folder: the calibration set; created, or continued when it holds one of the same model.
        denoiser: the full-precision model; its weights hash ties the set to it.
        timestep_argument: name of the forward argument that carries the timestep.
        overwrite: start over where the folder holds a calibration set.
        sampler: description of what calls the denoiser; kept in the manifest.
        settings: what it was asked for, in text by name; kept beside the manifest's record.

    Raises:
        CalibrationError: the folder holds something else, a damaged set, or one of another model.
    """

    def __init__(
        self,
        folder: Path,
        denoiser: nn.Module,
        timestep_argument: str,
        *,
        overwrite: bool = False,
        sampler: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.settings = folder, settings
        self.other_settings: list[str] = []
        self.timestep_argument = timestep_argument
        self.calls: list[CallRecord] = []
        self._shards: list[ShardRecord] = []
        self._pending: dict[str, Tensor] = {}
        self._complete = False
        self._flushed_at, self._patience = time.monotonic(), 0.0
        self._empty = Manifest(
            complete=False,
            model=type(denoiser).__name__,
            model_hash=weights_hash(denoiser),
            timestep_argument=timestep_argument,
            schedules=[],
            shards=[],
            calls=[],
            sampler=sampler,
        )
        self._prepare(overwrite)
        self._reader = ShardReader(folder, self._shards)
        self._known = {key for shard in self._shards for key in shard.tensors}

    def _prepare(self, overwrite: bool) -> None:
        folder = self.folder
        if not (folder / MANIFEST_NAME).is_file() and (found := _foreign(folder)):
            raise CalibrationError(
                f"{folder} is not empty and is not a calibration set (it holds {found!r}); choose another folder to "
                "record into"
            )
        if (folder / MANIFEST_NAME).is_file() and not overwrite:
            self._continue()
        else:
            # First: killed while the old shards are taken away, the folder still is a calibration set.
            MANIFEST.write(folder / MANIFEST_NAME, self._empty, self.settings)
        named = {shard.file for shard in self._shards}
        for path in [path for path in folder.glob(SHARDS) if path.name not in named]:  # overwritten, or cut short
            path.unlink()
        remove_abandoned(folder)

    def _continue(self) -> None:
        manifest = read_manifest(self.folder)
        check_shards(self.folder, manifest)
        for field in ("model", "model_hash", "timestep_argument"):
            found, expected = getattr(manifest, field), getattr(self._empty, field)
            if found != expected:
                raise CalibrationError(
                    f"{self.folder} was recorded from another denoiser: its {field} is {found[:40]}, this one's is "
                    f"{expected[:40]}. Record into another folder, or {START_OVER}."
                )
        self.calls, self._shards = list(manifest.calls), list(manifest.shards)
        self._complete = manifest.complete
        there, here = MANIFEST.settings_of(self.folder / MANIFEST_NAME), self.settings or {}
        names = [name for name in sorted(there.keys() & here.keys()) if there[name] != here[name]]
        self.other_settings = [f"{name} is {_short(here[name])} here and {_short(there[name])} there" for name in names]

    def fetch(self, key: str) -> Tensor:
        """A recorded tensor, by content hash."""
        return self._pending[key].clone() if key in self._pending else self._reader.get(key)

    def knows(self, key: str) -> bool:
        """Whether a tensor was recorded already, by content hash."""
        return key in self._known

    def append(self, record: CallRecord, tensors: dict[str, Tensor]) -> None:
        """Add a call; ``tensors`` holds at least those it names that are new."""
        nodes = (*record.inputs.values(), record.output)
        for key in (key for node in nodes for key in tensor_keys(node)):
            if key not in self._known:
                self._known.add(key)
                self._pending[key] = tensors[key]
        self.calls.append(record)
        self._complete = False
        waiting = sum(t.numel() * t.element_size() for t in self._pending.values())
        if waiting >= SHARD_BYTES or time.monotonic() - self._flushed_at >= self._patience:
            self.flush()

    def flush(self) -> None:
        """Bring every call so far to disk."""
        started = time.monotonic()
        if self._pending:
            # State changes only after the file is in place: interrupted here, the same flush can run again.
            shard = write_shard(self.folder, len(self._shards), self._pending)
            self._shards.append(shard)
            self._pending = {}
            self._reader = ShardReader(self.folder, self._shards)
        schedules = visited_schedules(call.timesteps for call in self.calls)
        update = {
            "complete": self._complete,
            "schedules": schedules,
            "shards": self._shards,
            "calls": self.calls,
        }
        MANIFEST.write(self.folder / MANIFEST_NAME, self._empty.model_copy(update=update), self.settings)
        self._flushed_at = time.monotonic()
        cost = self._flushed_at - started
        self._patience = 0.0 if cost < FREE_SECONDS else min(cost / FLUSH_SHARE, FLUSH_SECONDS)

    def finish(self) -> None:
        """Bring every call to disk and mark the calibration set as complete."""
        self._complete = True
        self.flush()


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."


def _foreign(folder: Path) -> str:
    """Name of something in a folder that recording has not left there; empty: there is nothing."""
    ours = (LOCK, lock_name(MANIFEST_NAME))
    return next((path.name for path in folder.iterdir() if path.name not in ours and not is_scratch(path)), "")
