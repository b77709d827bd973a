from __future__ import annotations

import pytest

from dq_plugins import plots, registry
from dq_plugins.plan import PassRecord
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
