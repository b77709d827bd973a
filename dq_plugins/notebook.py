"""Small HTML for notebooks: escaped text in a table, no script and no style sheet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

SHOWN = 200
"""Rows of a table that a notebook shows."""


def html_table(headings: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> str:
    """A table for ``_repr_html_``; of a long one, the first rows and how many more there are.

    Args:
        headings: of the columns; empty: the table has none.
        rows: cells as text.
        title: stands above it.

    Example:
        >>> html_table(["a"], [["<b>"]])
        '<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>&lt;b&gt;</td></tr></tbody></table>'
    """
    rows = list(rows)
    head = f"<thead>{_row(headings, 'th')}</thead>" if headings else ""
    body = "".join(_row(row, "td") for row in rows[:SHOWN])
    caption = f"<p><b>{escape(title)}</b></p>" if title else ""
    rest = f"<p>and {len(rows) - SHOWN} more</p>" if len(rows) > SHOWN else ""
    return f"{caption}<table>{head}<tbody>{body}</tbody></table>{rest}"


def _row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
