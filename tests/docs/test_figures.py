"""No figure without a record: the numbers of every table of results stand in records under benchmarks/results/.

A line ``<!-- record: NAME NAME -->`` before a table names the records of its figures. A number of a cell must be one of
what `benchmarks.derived` computes from them (all they hold, where it computes nothing), rounded as it is printed. Row
labels, headings and code are not figures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.derived import derive

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
RECORD = re.compile(r"<!-- record: (.+) -->")
MEASURED = re.compile(r"\d\.\d|\d ?(?:x|dB|ms|s|%|kB|MB)\b")
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?(?![\d.]\d)")


@dataclass(frozen=True)
class ResultTable:
    """A table of a page: where it stands, the records that a comment before it names, and its cells."""

    place: str
    records: tuple[str, ...]
    rows: list[list[str]]

    def cells(self) -> Iterator[tuple[str, str]]:
        """Label of the row and text of every cell after the first, code taken out."""
        for label, *cells in self.rows:
            for cell in cells:
                yield label.strip(), re.sub(r"`[^`]*`", "", re.sub(r"(?<=\d),(?=\d{3})", "", cell))


def tables(text: str, name: str) -> Iterator[ResultTable]:
    """The tables of a page; the first two lines of each are its headings."""
    lines = text.splitlines()
    for start, line in enumerate(lines):
        if not line.startswith("|") or (start and lines[start - 1].startswith("|")):
            continue
        rows = []
        for row in lines[start + 2 :]:
            if not row.startswith("|"):
                break
            rows.append(row.strip("|").split("|"))
        above = next((each for each in reversed(lines[:start]) if each.strip()), "")
        found = RECORD.fullmatch(above)
        yield ResultTable(f"{name}:{start + 1}", tuple(found[1].split()) if found else (), rows)


def leaves(data: Any) -> Iterator[float]:
    """Every number in JSON data, also those in texts and as keys."""
    if isinstance(data, dict):
        data = [*data, *data.values()]
    if isinstance(data, list):
        for each in data:
            yield from leaves(each)
    elif isinstance(data, str):
        yield from map(float, NUMBER.findall(data))
    elif isinstance(data, int | float):
        yield float(data)


def missing(table: ResultTable, values: set[float]) -> list[str]:
    """What of the table's numbers is not among ``values``, with its place."""
    found = []
    for label, cell in table.cells():
        for number in NUMBER.findall(cell):
            mantissa, _, exponent = number.partition("e")
            half = 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
            if not any(abs(value - float(number)) <= half * (1 + 1e-6) for value in values):
                found.append(f"{table.place}, row {label!r}: {number}")
    return found


def recorded(names: tuple[str, ...]) -> set[float]:
    """Numbers of what the records say."""
    found: set[float] = set()
    for name in names:
        data = json.loads((RESULTS / f"{name}.json").read_text())
        found |= {*leaves(derive(name, data))}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_stand_in_records(page: Path) -> None:
    wrong = []
    for table in tables(page.read_text(), page.name):
        if table.records:
            wrong += missing(table, recorded(table.records))
        elif any(MEASURED.search(cell) for _, cell in table.cells()):
            wrong.append(f"{table.place}: names no record")
    assert not wrong, "\n".join(wrong)


def test_records_that_are_named_exist() -> None:
    named = {name for page in PAGES for table in tables(page.read_text(), page.name) for name in table.records}
    assert named
    assert not [name for name in named if not (RESULTS / f"{name}.json").is_file()]


TEXT = """
<!-- record: some -->

| method | error | time |
|---|---|---|
| ours, 4 bits | 1.25 dB (0.5x) | `7.77` W4A8 |
| others | 3.1e-4 | 7,500 |
"""


def test_rounding_is_the_printed_one() -> None:
    (table,) = tables(TEXT, "page")
    assert table.records == ("some",)
    assert missing(table, {1.2549, 0.46, 3.14e-4, 7500.4}) == []
    assert missing(table, {1.2551, 0.46, 3.16e-4, 7500.6}) == [
        "page:4, row 'ours, 4 bits': 1.25",
        "page:4, row 'others': 3.1e-4",
        "page:4, row 'others': 7500",
    ]
