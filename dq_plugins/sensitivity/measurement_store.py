"""Measurements on disk: append-only, keyed by a signature, shared by several processes.

A store is a folder for one signature (model, data, quantizers, seeds). ``entries.jsonl`` holds one finished unit of
work a line; a line that was cut off when a process died is ignored. A unit is claimed by creating a file, which one
process only can do, also on a shared file system; claims without a result are those of processes that died, and a new
run drops them. So a killed and restarted measurement repeats at most the one unit that each of its processes was at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from dq_plugins.artifact import STRICT, Format
from dq_plugins.atomic import write_atomically
from dq_plugins.errors import DQError
from dq_plugins.hashing import hash_json
from dq_plugins.version import __version__

Sums = dict[str, float]
"""Result of a unit: sums by entry key, ``signal`` (what they are relative to), ``calls`` (cost in denoiser calls)."""

FORWARD, BACKWARD = 1.0, 2.0
"""Cost of a forward and of a backward pass, in denoiser calls."""

ENTRIES, CLAIMS, SIGNATURE = "entries.jsonl", "claims", "signature.json"


@dataclass(frozen=True)
class FinishedUnit:
    """A finished unit."""

    __pydantic_config__ = STRICT

    unit: str
    sums: Sums


FINISHED_UNIT: Format[FinishedUnit] = Format(
    "measurement", 1, FinishedUnit, what="a measurement", remedy="Delete its folder to measure again."
)


class Store:
    """Finished units of one measurement.

    Args:
        folder: parent of the store's own folder; may hold many stores.
        signature: everything that determines the values, as JSON data.
    """

    def __init__(self, folder: str | Path, signature: Mapping[str, Any]) -> None:
        signature = {**signature, "dq-plugins": __version__}
        digest = hash_json(signature)
        self.folder = Path(folder) / digest[:16]
        self._claims = self.folder / CLAIMS
        self._claims.mkdir(parents=True, exist_ok=True)
        described = self.folder / SIGNATURE
        if not described.exists():
            write_atomically(described, (json.dumps(signature, indent=1, sort_keys=True) + "\n").encode())

    def read(self) -> dict[str, Sums]:
        """Finished units, by key.

        Raises:
            ArtifactError: a line is damaged.
        """
        path = self.folder / ENTRIES
        if not path.exists():
            return {}
        units: dict[str, Sums] = {}
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines):
            # empty: the end, or the newline that `add` puts in front; cut off: a process died while it wrote
            if line and not _cut_off(line):
                entry = FINISHED_UNIT.of_text(line, f"{path}:{number + 1}")
                units[entry.unit] = entry.sums
        return units

    def add(self, unit: str, sums: Sums) -> None:
        """Append a finished unit; it is on disk when this returns.

        Raises:
            DQError: the disk took a part of it, which counts as nothing.
        """
        # the newline in front ends a line that a dying process may have left open; one write, so lines never mix
        line = b"\n" + FINISHED_UNIT.to_text(FinishedUnit(unit, sums)) + b"\n"
        handle = os.open(self.folder / ENTRIES, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(handle, line) < len(line):
                raise DQError(
                    f"{self.folder / ENTRIES} could not be written: the disk is full, or there is a quota on it"
                )
            os.fsync(handle)
        finally:
            os.close(handle)

    def claim(self, unit: str) -> bool:
        """Whether this process gets the unit; False when another has it or has finished it."""
        try:
            os.close(os.open(self._claim(unit), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def drop_claims(self) -> None:
        """Forget the claims of units without a result; for a run that starts when no other is at this store."""
        finished = {self._claim(unit).name for unit in self.read()}
        for claim in self._claims.iterdir():
            if claim.name not in finished:
                claim.unlink(missing_ok=True)

    def _claim(self, unit: str) -> Path:
        return self._claims / sha256(unit.encode()).hexdigest()[:32]


def _cut_off(line: bytes) -> bool:
    return line.startswith(b"{") and not line.endswith(b"}}")
