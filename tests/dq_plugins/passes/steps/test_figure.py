from __future__ import annotations

import pytest

from dq_plugins.errors import PlanError
from dq_plugins.passes.steps.figure import draw, steps_figure
from dq_plugins.testing.denoiser import TinyDenoiser
from dq_plugins.testing.plans import handmade_plan


def test_every_point_is_drawn_with_its_number_of_steps():
    axis = draw({"joint": [[2.0, 0.1, 5], [1.0, 0.2, 4]]}, "BitOps", (2.0, 0.1)).axes[0]
    assert list(axis.lines[0].get_xdata()) == [1.0, 2.0]
    assert [t.get_text() for t in axis.texts] == ["4", "5"]
    assert axis.lines[1].get_label() == "chosen"


def test_a_plan_without_points_says_how_to_get_them():
    with pytest.raises(PlanError, match="sweep"):
        steps_figure(handmade_plan(TinyDenoiser()))
