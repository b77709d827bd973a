"""One self-contained HTML page: text, tables and pictures, no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import TYPE_CHECKING

from dq_plugins.atomic import write_atomically
from dq_plugins.report.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #1c2127; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d8dee4; }
table { border-collapse: collapse; font-size: .85rem; margin: .8rem 0; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #e4e8ec; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img, svg { max-width: 100%; height: auto; } figcaption, .note { color: #57606a; font-size: .85rem; }
details { margin: .8rem 0; } summary { cursor: pointer; }
"""


class Page:
    """Builds a report section by section.

    Example:
        >>> page = Page("Quantized emoji U-Net")
        >>> page.text("W8A8, 8 timestep groups.")
        >>> "8 timestep groups" in page.html()
        True
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        """Start a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def note(self, text: str) -> None:
        """Add a paragraph in small print: how a figure was measured, what it does not say."""
        self._parts.append(f'<p class="note">{html.escape(text)}</p>')

    def table(self, table: Table, *, folded: str | None = None) -> None:
        """Add a table; ``folded`` is the summary line of a table that opens on a click."""
        content = table.html()
        if folded is not None:
            content = f"<details><summary>{html.escape(folded)}</summary>{content}</details>"
        self._parts.append(content)

    def figure(self, figure: Figure, caption: str) -> None:
        """Add a matplotlib figure as SVG."""
        from io import StringIO

        buffer = StringIO()
        # a fixed salt and no date: the same data gives the same bytes
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": "dq-plugins"}):
            figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        svg = buffer.getvalue()
        self._figure(svg[svg.index("<svg") :], caption)

    def image(self, png: bytes, caption: str, *, width: int | None = None) -> None:
        """Add a PNG image."""
        data = base64.b64encode(png).decode()
        size = f' width="{width}"' if width else ""
        self._figure(f'<img alt="{html.escape(caption)}"{size} src="data:image/png;base64,{data}">', caption)

    def _figure(self, content: str, caption: str) -> None:
        self._parts.append(f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>")

    def html(self) -> str:
        """The whole page."""
        title = html.escape(self.title)
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
            f"<body><h1>{title}</h1>{''.join(self._parts)}</body></html>\n"
        )

    def save(self, path: str | Path) -> Path:
        """Write the page; an interrupted write leaves no half page."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.html().encode())
        return path
