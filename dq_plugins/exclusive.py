"""A folder that one process works in at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dq_plugins.errors import DQError
from dq_plugins.scratch import make_folder

LOCK = ".lock"


@contextmanager
def exclusive(
    folder: str | Path, *, name: str = LOCK, patience: float = 0, error: type[DQError] = DQError
) -> Iterator[None]:
    """Keep other processes that ask likewise out of ``folder``, which is made if it is not there.

    The operating system holds the lock and lets go of it when the process ends, however it ends: what a killed run
    leaves behind does not keep the next one out.

    Args:
        folder: where the lock lies.
        name: of the lock: who asks for another one is not kept out.
        patience: seconds to wait for another process.
        error: what is raised.

    Raises:
        DQError: of the class ``error``: another process works there, or the folder cannot be made or written to.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    try:
        lock = FileLock(make_folder(folder) / name, thread_local=False)
        lock.acquire(timeout=patience)
    except Timeout:
        raise error(
            f"another process is writing to {folder} (it holds {folder / name}), and the two would delete each other's "
            "intermediate results: wait until it is done, or choose another folder"
        ) from None
    except OSError as found:
        raise error(f"{folder} cannot be written to: {found}") from found
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held, so that the file is nobody else's; Windows refuses
            (folder / name).unlink()
        lock.release()
