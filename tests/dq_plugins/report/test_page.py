import re
from pathlib import Path

import numpy as np

from dq_plugins.plots import activation_ranges, lines, pairs_of_images
from dq_plugins.report import Page, Table
from dq_plugins.report.pictures import Picture


def example() -> Page:
    page = Page("A <title>")
    page.heading("Results & figures")
    page.table(Table(["layer", "dB"], [["a<b", 40.5], ["c", None]]), folded="all layers")
    page.figure(lines({"ours": ([1, 2], [3.0, 4.0])}, "t", "dB"), "output SQNR")
    page.figure(activation_ranges({"conv": ([1, 2, 3], [-1, -2, -3], [1, 2, 3])}, {"conv": [1.5]}), "ranges")
    page.figure(pairs_of_images({"fp32": [[[0.0, 1.0], [1.0, 0.0]]]}, ["cat"]), "images")
    page.note("<b>small print</b>")
    page.facts({"recipe": "<fast>"})
    page.warning("slow & busy")
    page.pictures({"a <cat>": [Picture(np.eye(2), "fp32")]}, "one picture")
    return page


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    text = example().save(tmp_path / "report.html").read_text()
    assert "A &lt;title&gt;" in text
    assert "<td>a&lt;b</td>" in text
    assert '<td class="number">40.5</td>' in text
    assert "<summary>all layers</summary>" in text
    assert "Results &amp; figures" in text
    assert "&lt;b&gt;small print&lt;/b&gt;" in text
    assert text.count("<svg") == 3
    assert "<dt>recipe</dt><dd>&lt;fast&gt;</dd>" in text
    assert '<p class="warning">slow &amp; busy</p>' in text
    assert 'alt="a &lt;cat&gt;: fp32"' in text
    assert text.count("<script") == 1  # it sorts tables, and loads nothing
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text)


def test_same_data_same_bytes() -> None:
    assert example().html() == example().html()


def test_table_aligns_numbers_right() -> None:
    text = str(Table(["name", "n"], [["a", 1], ["b", 200]]))
    assert text.splitlines() == ["name    n", "----  ---", "a       1", "b     200"]
