"""Files that are never seen half written, even when several processes write them. All that is kept is written here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dq_plugins.scratch import Scratch


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the path that this gives; it takes the place of ``path`` when the block ends without an exception.

    So the name always stands for either the old content or the new one. Several processes may do it at once: each
    writes in a scratch folder of its own beside the place, and the last to rename its file wins.

    Raises:
        OSError: the disk is full, the folder is a file, or may not be written; it names the file.
    """
    try:
        with Scratch("write", path.parent) as folder:
            temporary = folder / path.name
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error  # a full disk does not say of which file
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file by way of `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
