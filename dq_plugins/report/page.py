"""One self-contained HTML page: text, tables and pictures, nothing loaded from elsewhere.

Its one script sorts folded tables by a clicked heading; everything can be read without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from dq_plugins.atomic import write_atomically
from dq_plugins.report.pictures import Picture
from dq_plugins.report.table import Table, cell_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters["cell"] = cell_text


class Page:
    """Builds a report section by section; ``templates/page.html`` says how it looks.

    Example:
        >>> page = Page("Quantized emoji U-Net")
        >>> page.text("W8A8, 8 timestep groups.")
        >>> "8 timestep groups" in page.html()
        True
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[tuple[str, Any, str]] = []

    def heading(self, text: str) -> None:
        """Start a section."""
        self._parts.append(("heading", text, ""))

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(("text", text, ""))

    def note(self, text: str) -> None:
        """Add a paragraph in small print: how a figure was measured, what it does not say."""
        self._parts.append(("note", text, ""))

    def warning(self, text: str) -> None:
        """Add a paragraph that must not be missed: what makes a figure of this page doubtful."""
        self._parts.append(("warning", text, ""))

    def facts(self, facts: Mapping[str, str]) -> None:
        """Add short facts, each under its name, side by side where there is room."""
        self._parts.append(("facts", dict(facts), ""))

    def pictures(self, columns: Mapping[str, Sequence[Picture]], caption: str) -> None:
        """Add pictures in columns: title -> pictures from top to bottom."""
        self._parts.append(("pictures", {title: list(pictures) for title, pictures in columns.items()}, caption))

    def table(self, table: Table, *, folded: str = "") -> None:
        """Add a table; ``folded`` is the summary line of a table that opens on a click."""
        self._parts.append(("table", table, folded))

    def figure(self, figure: Figure, caption: str) -> None:
        """Add a matplotlib figure as SVG."""
        import matplotlib

        buffer = StringIO()
        # a fixed salt and no date: the same data gives the same bytes
        with matplotlib.rc_context({"svg.hashsalt": "dq-plugins"}):
            figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        svg = buffer.getvalue()
        self._parts.append(("figure", Markup(svg[svg.index("<svg") :]), caption))

    def html(self) -> str:
        """The whole page."""
        return _templates.get_template("page.html").render(title=self.title, parts=self._parts)

    def _repr_html_(self) -> str:
        """The page in a frame of a notebook, where its script does not run."""
        return f'<iframe sandbox="" width="100%" height="640" srcdoc="{escape(self.html())}"></iframe>'

    def save(self, path: str | Path) -> Path:
        """Write the page; an interrupted write leaves no half page."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.html().encode())
        return path
