"""Finished units of a loop that may be interrupted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, TypeVar

from dq_plugins.artifact.files import Mapped
from dq_plugins.artifact.format import Format

T = TypeVar("T")


class UnitResults(Generic[T]):
    """Results of the units of a loop (blocks, chunks of layers, timesteps), one artifact each.

    Args:
        format: of the results.
        folder: where they lie, made with the first of them; None: nothing is kept, and nothing is found.
        settings: everything that determines them, as JSON data. Results of other settings, or of another release,
            count as absent, and so do damaged ones: that unit runs again.
        mapped: where the tensors of results are, see `dq_plugins.artifact.files.Mapped`.
    """

    def __init__(
        self, format: Format[T], folder: str | Path | None, settings: Mapping[str, Any], mapped: Mapped = False
    ) -> None:
        self.format, self.folder, self.settings = format, None if folder is None else Path(folder), dict(settings)
        self.mapped = mapped

    def find(self, unit: str, *, mapped: Mapped | None = None) -> T | None:
        """Result of a unit, if it is there; ``mapped``: as the results are by default."""
        if self.folder is None:
            return None
        where = self.mapped if mapped is None else mapped
        try:
            return self.format.find(self.path(unit), {**self.settings, "unit": unit}, mapped=where)
        except self.format.error:
            return None

    def keep(self, unit: str, result: T) -> T:
        """Write the result of a finished unit.

        Returns:
            It, with its tensors in the file where results are mapped.
        """
        if self.folder is None:
            return result
        self.format.write(self.path(unit), result, {**self.settings, "unit": unit})
        found = self.find(unit) if self.mapped else None
        return result if found is None else found

    def forget(self, unit: str) -> None:
        """Remove the result of a unit, if there is one."""
        if self.folder is not None:
            self.path(unit).unlink(missing_ok=True)

    def path(self, unit: str) -> Path:
        """File of a unit."""
        assert self.folder is not None
        named = f"{self.format.name} {unit}"  # results of several formats may lie side by side
        readable = re.sub(r"[^A-Za-z0-9.-]+", "_", unit)[:64].strip("._")
        return self.folder / f"{readable}-{sha256(named.encode()).hexdigest()[:12]}.safetensors"
