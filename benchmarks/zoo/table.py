"""The table of the zoo in the documentation, from the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.zoo.stages import STAGES

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
HEAD = "| denoiser | stages | t / conditions / sample | integers | of parameters | what stays | integer - simulated |"
START, END = "<!-- the tables are written by `make zoo` -->", "<!-- end of the tables -->"


def rows(outcomes: Mapping[str, Mapping[str, Any]], family: str) -> Iterator[str]:
    """The rows of one family."""
    for name, found in outcomes.items():
        if found["family"] != family:
            continue
        failed = found["failed"]
        stages = "all" if not failed else f"{STAGES.index(failed)}, then `{failed}`: `{brief(found['error'])}`"
        parts = f"{found['temporal']} / {found['condition']} / {found['sample']}" if found["tracer"] else ""
        kept = "; ".join(f"{count} `{brief(reason)}`" for reason, count in found["other"].items())
        measured = (f"{found['integer']}", f"{found['share']:.2f}", kept, f"{found['integer_error']:.0e}")
        cells = measured if found["integer"] or found["other"] else ("", "", "", "")
        yield "| " + " | ".join((f"`{name}`", stages, parts, *cells)) + " |"


def brief(text: str, limit: int = 90) -> str:
    """A reason without what breaks a cell."""
    text = " ".join(text.replace("|", "/").replace("`", "'").split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def tables(outcomes: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for each family."""
    parts = []
    for family in dict.fromkeys(found["family"] for found in outcomes.values()):
        of_family = [found for found in outcomes.values() if found["family"] == family]
        through = sum(not found["failed"] for found in of_family)
        title = f"## {family[0].upper()}{family[1:]}: {through} of {len(of_family)} through all stages"
        line = "|" + "---|" * HEAD.count(" | ") + "---|"
        parts.append("\n".join([title, "", "<!-- record: zoo -->", "", HEAD, line, *rows(outcomes, family)]))
    return "\n\n".join(parts)


def write_page(outcomes: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the tables into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.index(START) + len(START), text.index(END)
    PAGE.write_text(f"{text[:before]}\n\n{tables(outcomes)}\n\n{text[after:]}", encoding="utf-8")
