"""A table that prints as aligned text and as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

Cell = str | int | float | None


def _text(cell: Cell) -> str:
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

    def __str__(self) -> str:
        texts = [[_text(cell) for cell in row] for row in self.rows]
        widths = [max(len(h), *(len(row[i]) for row in texts), 0) for i, h in enumerate(self.headings)]
        numeric = [all(isinstance(row[i], int | float | None) for row in self.rows) for i in range(len(widths))]

        def line(cells: Sequence[str]) -> str:
            padded = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True)]
            return "  ".join(padded).rstrip()

        return "\n".join([line(list(self.headings)), line(["-" * w for w in widths]), *map(line, texts)])

    def html(self) -> str:
        """The table as an HTML element."""
        head = "".join(f"<th>{html.escape(h)}</th>" for h in self.headings)
        body = "".join(
            "<tr>"
            + "".join(
                f'<td class="{"number" if isinstance(c, int | float) else "text"}">{html.escape(_text(c))}</td>'
                for c in row
            )
            + "</tr>"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
