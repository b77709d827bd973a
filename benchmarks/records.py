"""Figures on disk: one JSON file a benchmark, written entry by entry, so that a run that was cut leaves what it had."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dq_plugins.atomic import write_atomically

RESULTS = Path(__file__).parent / "results"


class Records:
    """Entries of one benchmark by key; those on disk are kept as long as the settings are the same.

    Args:
        name: of the file, without suffix.
        settings: what the figures depend on; with other settings the file starts over.
        folder: where the file lies.
    """

    def __init__(self, name: str, settings: dict[str, Any], folder: Path = RESULTS) -> None:
        self.path = folder / f"{name}.json"
        described = json.loads(json.dumps(settings | {"torch": torch.__version__}, default=str))
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.data: dict[str, Any] = found if found.get("settings") == described else {"settings": described}

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """The entry under a key, measured and written now if it is not there."""
        if key not in self.data:
            self.put(key, measure())
        return self.data[key]

    def put(self, key: str, value: Any) -> None:
        """Write one entry."""
        self.data[key] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (json.dumps(self.data, indent=1) + "\n").encode())
