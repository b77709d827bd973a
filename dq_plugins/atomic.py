"""Files that are never seen half written, even when several processes write them."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that its name always stands for either the old content or the new one.

    Several processes may do it at once: each writes a file of its own, ``NAME.*.tmp`` beside the place, and the last
    to rename it wins.
    """
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
