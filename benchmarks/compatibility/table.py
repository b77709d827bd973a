"""The table of versions in the documentation, from the record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.compatibility.smoke import PACKAGES, STAGES
from benchmarks.zoo.table import brief

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
START, END = "<!-- the table is written by `make compatibility` -->", "<!-- end of the table -->"


def table(outcomes: Mapping[str, Mapping[str, Any]]) -> str:
    """One row an environment."""
    columns = ("Python", *PACKAGES, "what works")
    lines = ["| environment | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, found in outcomes.items():
        if "failed" in found:
            cells = ["" for _ in range(len(PACKAGES) + 1)] + [f"not made: `{brief(found['failed'])}`"]
        else:
            stages = found["stages"]
            wrong = [f"`{each}`: `{brief(stages[each])}`" for each in STAGES if stages[each] != "ok"]
            works = f"{len(STAGES) - len(wrong)} of {len(STAGES)}"
            cells = [f"`{version or '-'}`" for version in found["versions"].values()]
            cells.append("all" if not wrong else f"{works}; not {'; '.join(wrong)}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_page(outcomes: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the table into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.index(START) + len(START), text.index(END)
    table_ = f"<!-- record: compatibility -->\n\n{table(outcomes)}"
    PAGE.write_text(f"{text[:before]}\n\n{table_}\n\n{text[after:]}", encoding="utf-8")
