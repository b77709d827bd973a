"""What plans, tables, pages and comparisons show in a notebook."""

import re

import pytest

from dq_plugins.notebook import SHOWN, html_table
from dq_plugins.plan.diff import diff_plans
from dq_plugins.report import Page, Table
from dq_plugins.testing.denoiser import TinyDenoiser
from dq_plugins.testing.plans import handmade_plan


def plan(model: str = "A <script>alert(1)</script> model"):
    made = handmade_plan(TinyDenoiser())
    made.model = model
    return made


def shown():
    table = Table(["<b>", "n"], [["a & b", 1.23456]])
    page = Page("<script>alert(1)</script>")
    return {"plan": plan(), "diff": diff_plans(plan(), plan("<script>")), "table": table, "page": page}


@pytest.mark.parametrize("what", ["plan", "diff", "table", "page"])
def test_is_small_escaped_and_without_a_script(what: str) -> None:
    html = shown()[what]._repr_html_()
    assert len(html) < 16_000
    assert "<script" not in html
    assert "&lt;" in html
    outside = re.sub(r'"[^"]*"', "", html)
    assert outside.count("<table") == outside.count("</table>")


def test_plan_tells_what_its_text_tells() -> None:
    made = plan("TinyDenoiser")
    cells = re.findall(r"<td>(.*?)</td>", made._repr_html_())
    for name, value in zip(cells[::2], cells[1::2], strict=True):
        assert name in repr(made)
        assert value in repr(made).replace("   ", " ") or value in repr(made)


def test_equal_plans_say_so() -> None:
    assert str(diff_plans(plan(), plan())) == "the plans are equal"
    assert "equal" in diff_plans(plan(), plan())._repr_html_()


def test_a_long_table_says_what_it_leaves_out() -> None:
    html = html_table(["n"], [[str(i)] for i in range(SHOWN + 3)])
    assert html.count("<tr>") == SHOWN + 1
    assert html.endswith("<p>and 3 more</p>")
