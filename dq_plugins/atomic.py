"""Files that are never seen half written, even when several processes write them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the path that this gives; it takes the place of ``path`` when the block ends without an exception.

    So the name always stands for either the old content or the new one. Several processes may do it at once: each
    writes a file of its own, ``NAME.*.tmp`` beside the place, and the last to rename it wins.
    """
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file by way of `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
