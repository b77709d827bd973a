"""A folder that one process works in at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dq_plugins.errors import DQError

LOCK = ".lock"


@contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Keep other processes that ask likewise out of ``folder``, which is made if it is not there.

    The operating system holds the lock and lets go of it when the process ends, however it ends: what a killed run
    leaves behind does not keep the next one out.

    Raises:
        DQError: another process works there.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DQError(
            f"another process is writing to {folder} (it holds {folder / LOCK}), and the two would delete each other's "
            "intermediate results: wait until it is done, or choose another folder"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held, so that the file is nobody else's; Windows refuses
            (folder / LOCK).unlink()
        lock.release()
