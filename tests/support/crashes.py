"""Kills at every write: what a command finds when the one before it was killed, at each moment that makes a difference.

A kill takes the memory of a process and its locks, and leaves the files. So one run shows what kills at all its moments
would leave: before and after every call that changes the disk, the folder is copied; a file that is being written is
copied cut short as well. Each copy that differs from the others is then put in place, and the command run on it.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from dq_plugins.scratch import is_scratch

T = TypeVar("T")
CHANGES = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync")


@dataclass(frozen=True)
class State:
    """What a kill leaves.

    Attributes:
        moment: when it came.
        files: copy of the folder.
        units: finished at that time.
    """

    moment: str
    files: Path
    units: int


class Kills:
    """States of a folder that kills leave; see `watched`."""

    def __init__(self, folder: Path, store: Path, units: Callable[[], int]) -> None:
        self.folder, self.store, self.units = folder, store, units
        self.states: list[State] = []
        self._known: set[str] = set()

    def look(self, moment: str, cut: Path | None = None) -> None:
        """Copy the folder, if it differs from every earlier copy; ``cut``: a file of which half is written."""
        if not self.folder.exists() or (digest := _digest(self.folder, cut)) in self._known:
            return
        self._known.add(digest)
        files = self.store / f"{len(self.states):04d}"
        shutil.copytree(self.folder, files)
        if cut is not None:
            half = files / cut.relative_to(self.folder)
            half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
        self.states.append(State(moment, files, self.units()))


def _digest(folder: Path, cut: Path | None) -> str:
    """Of everything but the bytes in scratch folders: of those, which files there are, and which one is cut short."""
    found = [f"cut {cut.name}"] if cut is not None else []
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        scratch = next((each for each in (place, *place.parents) if is_scratch(each)), None)
        if scratch is not None:
            found.append(f"{scratch.parent} scratch {path.name if place != scratch else ''}")
        else:
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            found.append(f"{place} {content}")
    return "\n".join(found)


@contextmanager
def watched(folder: Path, store: Path, units: Callable[[], int] = int, within: Path | None = None) -> Iterator[Kills]:
    """Find every state of ``folder`` that a kill inside of the block would leave.

    Args:
        folder: that the block writes to.
        store: an empty folder for the copies.
        units: how many units of work are finished.
        within: part of the folder; only changes there count.
    """
    kills, busy = Kills(folder, store, units), [False]

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            writes = not name.endswith("open") or set(str((*args, "r")[1]) + str(kwargs.get("mode", ""))) & set("wax+")
            place = Path(os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else args[0])
            if busy[0] or not writes or not (kwargs.get("dir_fd") or place.is_relative_to(within or folder)):
                return call(*args, **kwargs)
            busy[0] = True
            try:
                moment = f"{name} {' '.join(Path(str(a)).name for a in args[:2])}"
                if name == "os.fsync":
                    moment = f"{name} {place.name}"
                    kills.look(f"in the middle of writing {place.name}", cut=place)
                kills.look(f"before {moment}")
                found = call(*args, **kwargs)
                kills.look(f"after {moment}")
                return found
            finally:
                busy[0] = False

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, wrapped(f"os.{name}", getattr(os, name)))
        for module in (builtins, io):
            patch.setattr(module, "open", wrapped(f"{module.__name__}.open", open))
        yield kills


def survives_kills(
    run: Callable[[], T],
    folder: Path,
    store: Path,
    *,
    units: Callable[[], int] = int,
    lost: int = 1,
    finished: Callable[[], object] | None = None,
    within: Path | None = None,
    every: int = 1,
) -> list[State]:
    """Run a command; kill it at every moment, run it again, and check that nothing else comes of it.

    Args:
        run: the command; what it returns is compared.
        folder: that it writes to; may hold something already.
        store: an empty folder for copies.
        units: counts the units of work that were finished, of all runs.
        lost: how many of them a kill may cost.
        finished: what a reader finds in the folder at any moment, without the command run again; must not raise.
        within: see `watched`.
        every: tries one state in so many, where a run takes long; which ones is not a question of what is written.

    Returns:
        The states that were tried.
    """
    began = units()
    with watched(folder, store, units, within) as kills:
        expected = run()
    total = units() - began
    left = _files(folder)
    tried = kills.states[::every]
    for state in tried:
        shutil.rmtree(folder)
        shutil.copytree(state.files, folder)
        if finished is not None:
            finished()
        before = units()
        try:
            found = run()
        except Exception as error:
            raise AssertionError(f"killed {state.moment}, the same command fails: {error}") from error
        assert found == expected, f"killed {state.moment}, the same command gives something else"
        again = units() - before
        assert state.units - began + again <= total + lost, (
            f"killed {state.moment} with {state.units - began} of {total} units done, the same command does {again}"
        )
        others = _files(folder) ^ left
        assert not others, f"killed {state.moment}, the same command leaves other files: {others}"
    return tried


def _files(folder: Path) -> set[str]:
    found = [path for path in folder.rglob("*") if path.is_file() or not any(path.iterdir())]
    assert not [path for path in found if any(is_scratch(each) for each in (path, *path.parents))], found
    return {str(path.relative_to(folder)) for path in found}
