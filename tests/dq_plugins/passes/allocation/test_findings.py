from __future__ import annotations

import pytest

from dq_plugins.errors import PlanError
from dq_plugins.passes.allocation.findings import (
    AllocationFindings,
    LayerReason,
    explain,
    findings_of,
    table_of_reasons,
)
from dq_plugins.passes.allocation.problem import AllocationProblem, Budgets, LayerCost, allocate
from dq_plugins.plan import Section
from dq_plugins.quantized.candidates import Entry
from dq_plugins.quantized.width import WidthChoices


def solved(weight_bits: float = 5.0):
    layers = {"delicate": LayerCost(100, 10, 1000), "robust": LayerCost(1000, 10, 1000)}
    errors = {Entry("delicate", "weight", b): 1000 * 4.0**-b for b in (2, 4, 8)}
    errors |= {Entry("robust", "weight", b): 4.0**-b for b in (2, 4, 8)}
    return allocate(
        AllocationProblem(
            layers, errors, default_choices=WidthChoices((2, 4, 8)), budgets=Budgets(weight_bits=weight_bits)
        )
    )


def test_the_layer_that_hurts_most_comes_first_with_its_score_and_price():
    found = solved()
    first, second = explain(found)
    assert (first.layer, first.bits) == ("delicate", 8)
    assert first.bytes == 100
    assert first.floor == pytest.approx(1000 / 16 / found.error)
    assert (second.layer, second.bits, second.more_bits) == ("robust", 4, 8)
    assert second.extra == 500
    assert second.saved == pytest.approx((4.0**-4 - 4.0**-8) / found.error)
    assert first.share + second.share == pytest.approx(1)


def test_text_says_what_it_costs_and_what_more_would_buy():
    text = table_of_reasons(explain(solved()))
    delicate, robust = text.splitlines()
    assert "8 bits, its widest choice" in delicate
    assert "multiply the plan's error by" in delicate
    assert "8 bits would save" in robust
    assert "for 500 bytes" in robust


def test_long_tables_are_cut_and_say_so():
    assert table_of_reasons(explain(solved()), limit=1).splitlines()[-1].startswith("... and 1 more")


def test_findings_survive_the_plan_and_wrong_ones_are_refused():
    found = findings_of(solved(), [])
    section = Section.of(found)
    assert section.read(AllocationFindings) == found
    section.data["reasons"][0]["operand"] = "bias"
    with pytest.raises(PlanError, match=r"reasons\.0\.operand"):
        section.read(AllocationFindings)


def test_a_layer_gives_back_its_own_share_when_it_is_narrowed():
    # 0.9 of the error is its own already and would become 1.5: 1.6 in all
    assert "multiply the plan's error by 1.6" in LayerReason("a", "weight", 8, share=0.9, bytes=1, floor=1.5).why
