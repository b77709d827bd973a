"""Folders for what is not finished, or needed for the length of a computation only.

A folder goes when the process is done with it. What a killed process leaves behind, the next one to make a scratch
folder beside it takes away: each is held by a lock of the operating system, which ends with its process however that
ends, so nothing that is still in use is touched, and nothing that another program made.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from uuid import uuid4

OWNER = ".owner"
_LOCK = re.compile(r"\.dq-.+\.lock")
_OURS = re.compile(r"dq-.*-[0-9a-f]{32}\.tmp")


class Scratch:
    """A new, empty folder; it goes with `close`, with the end of a ``with`` block, or with the last reference.

    Args:
        what: it is for; part of its name.
        parent: where; made if it is not there. The system's folder for temporary files by default.

    Attributes:
        path: of the folder.
    """

    def __init__(self, what: str, parent: str | Path | None = None) -> None:
        place = Path(tempfile.gettempdir() if parent is None else parent)
        make_folder(place)
        remove_abandoned(place)
        while True:
            self.path = place / f"dq-{what}-{uuid4().hex}.tmp"
            self.path.mkdir(mode=0o700)
            with suppress(FileNotFoundError, FileExistsError):  # another took it away while the lock was made
                if (lock := _held(self.path / OWNER)) is not None:  # None: another is about to take it away
                    break
        self.close = weakref.finalize(self, _remove, self.path, lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_folder(folder: Path) -> Path:
    """Make a folder and those above it, where they are not there.

    Raises:
        OSError: it cannot be made; a `NotADirectoryError` says where a file is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next((each for each in (folder, *folder.parents) if each.exists() and not each.is_dir()), folder)
        raise NotADirectoryError(f"{file} is a file where a folder is needed; choose another name") from None
    return folder


def is_scratch(path: Path) -> bool:
    """Whether this is the name of a scratch folder."""
    return _OURS.fullmatch(path.name) is not None


def remove_abandoned(parent: Path) -> None:
    """Remove the scratch folders in ``parent`` that no living process holds, and locks on files there."""
    for path in parent.glob(".dq-*.lock"):
        with suppress(OSError):
            if _LOCK.fullmatch(path.name) and (lock := _held(path)) is not None:
                path.unlink(missing_ok=True)  # while it is held
                lock.release()  # type: ignore[attr-defined]
    for path in parent.glob("dq-*.tmp"):
        if not is_scratch(path) or path.is_symlink() or not path.is_dir():
            continue
        with suppress(OSError):  # another user's, or another process is quicker
            if not (path / OWNER).exists():
                path.rmdir()  # only if it is empty: being made, or almost gone
            elif (lock := _held(path / OWNER)) is not None:
                _remove(path, lock)


def _held(file: Path) -> object | None:
    """A lock, taken; None where it is another's."""
    from filelock import FileLock, Timeout

    lock = FileLock(file, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def _remove(folder: Path, lock: object) -> None:
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name == OWNER:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        (folder / OWNER).unlink(missing_ok=True)  # last, and while it is held, so that it is nobody else's
        folder.rmdir()
    lock.release()  # type: ignore[attr-defined]
    with suppress(OSError):  # Windows removes no file that is open
        (folder / OWNER).unlink(missing_ok=True)
        folder.rmdir()
