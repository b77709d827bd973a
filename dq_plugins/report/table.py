"""Rows under headings, printed as aligned text; `Page.table` shows them as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dq_plugins.notebook import html_table

Cell = str | int | float | None


def cell_text(cell: Cell) -> str:
    """A cell as it is shown: numbers with four digits, ``-`` for None."""
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


@dataclass
class Table:
    """Rows under headings; numbers are right-aligned.

    Example:
        >>> print(Table(["layer", "bits"], [["conv_in", 8]]))
        layer    bits
        -------  ----
        conv_in     8
    """

    headings: Sequence[str]
    rows: list[Sequence[Cell]] = field(default_factory=list)

    def _repr_html_(self) -> str:
        return html_table(self.headings, [[cell_text(cell) for cell in row] for row in self.rows])

    def __str__(self) -> str:
        texts = [[cell_text(cell) for cell in row] for row in self.rows]
        widths = [max(len(h), *(len(row[i]) for row in texts), 0) for i, h in enumerate(self.headings)]
        numeric = [all(isinstance(row[i], int | float | None) for row in self.rows) for i in range(len(widths))]

        def line(cells: Sequence[str]) -> str:
            padded = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True)]
            return "  ".join(padded).rstrip()

        return "\n".join([line(list(self.headings)), line(["-" * w for w in widths]), *map(line, texts)])
