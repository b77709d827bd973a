"""What a hostile file may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Bomb:
    """Pickle it: reading the pickle creates the file ``path``, as it might have run any other code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))
