from __future__ import annotations

import pytest
import torch

from dq_plugins import plots, registry
from dq_plugins.plan import ActivationQuant, AttentionPlan, PassRecord, Reason
from dq_plugins.recipe import Pass
from dq_plugins.report.plan_page import plan_page
from dq_plugins.testing.denoiser import TinyDenoiser
from dq_plugins.testing.plans import handmade_plan


class Drawing(Pass):
    """Draws what the plan holds."""

    name = "drawing"

    def run(self, plan, context):
        pass

    @classmethod
    def figure(cls, plan):
        return plots.lines({"layers": ([1, 2], [0, len(plan.layers)])}, "n", "layers"), f"{len(plan.layers)} <layers>"


class Failing(Drawing):
    @classmethod
    def figure(cls, plan):
        raise KeyError("curve")


@pytest.fixture
def plan():
    made = handmade_plan(TinyDenoiser())
    made.passes.append(PassRecord("drawing", {}))
    return made


def test_page_shows_the_figure_that_a_pass_of_the_plan_draws(plan):
    with registry.temporary("pass", "drawing", Drawing):
        page = plan_page(plan).html()
    assert page.count("<svg") == 1
    assert f"<figcaption>{len(plan.layers)} &lt;layers&gt;</figcaption>" in page
    assert "What drawing found" in page


def test_pass_that_is_not_installed_leaves_a_note(plan):
    page = plan_page(plan).html()
    assert "The pass drawing is not installed here" in page
    assert "<h2>Layers</h2>" in page


def test_pass_that_fails_leaves_a_note(plan):
    with registry.temporary("pass", "drawing", Failing):
        page = plan_page(plan).html()
    assert "The figure of the pass drawing is missing: KeyError" in page
    assert "<h2>Layers</h2>" in page


def test_page_and_overview_tell_the_widths_of_attentions(plan):
    assert "<h2>Attention</h2>" not in plan_page(plan).html()
    quant = ActivationQuant(6, "default", torch.ones(1), torch.zeros(1, dtype=torch.int32))
    plan.attention = {
        "block.attends": AttentionPlan(quant, quant, quant),
        "block.spared": AttentionPlan(unquantized_reason=Reason("it does <harm>", "measured")),
    }
    page = plan_page(plan).html()
    assert "<h2>Attention</h2>" in page
    assert "<td>block.attends</td>" in page
    assert "<td>A6</td>" in page
    assert "it does &lt;harm&gt;" in page
    assert "1 attention A6" in repr(plan)
    assert "1 attention full precision: it does <harm>" in repr(plan)
    assert "1 attention A6" in plan._repr_html_()
