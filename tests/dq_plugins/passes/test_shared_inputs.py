"""Which layers share an input, and what a run aims at for one of them."""

from __future__ import annotations

import pytest

import dq_plugins as dq
from dq_plugins.errors import PlanError
from dq_plugins.passes.shared_inputs import layers_by_input
from dq_plugins.plan import Targets
from dq_plugins.recipe import PassContext, Recipe, Step
from dq_plugins.testing.denoiser import calibrated

CONDITIONS = {"time_in", "time_out", "condition", "modulation"}
"""Layers that depend on the timestep and the condition alone."""
RANGES = Recipe("r", "", (Step("weight-ranges"), Step("activation-ranges", {"observer": "minmax"})))


@pytest.fixture(scope="module")
def case():
    with calibrated() as found:
        yield found


def widths(case, **targets) -> dict[str, tuple[int, int]]:
    plan = dq.make_plan(*case, RANGES, weight_bits=4, act_bits=4, edge_bits=6, progress=False, **targets)
    return {name: (layer.weight.bits, layer.activation.bits) for name, layer in plan.layers.items()}


def test_inputs_of_conditions_are_as_wide_as_asked_and_their_weights_as_all(case) -> None:
    usual = widths(case)
    assert {usual[name] for name in CONDITIONS} == {(4, 4)}
    wide = widths(case, condition_bits=8)
    assert {name for name, found in wide.items() if found != usual[name]} == CONDITIONS
    assert {wide[name] for name in CONDITIONS} == {(4, 8)}
    assert wide["first"] == wide["last"] == (6, 6)
    assert widths(case, condition_bits=2) == usual  # the least width, not the width


def test_floating_point_stays(case) -> None:
    plan = dq.make_plan(*case, RANGES, act_bits=None, condition_bits=8, progress=False)
    assert all(layer.activation is None for layer in plan.layers.values())


@pytest.mark.parametrize("bits", [1, 17, "8"])
def test_impossible_widths_are_refused(bits) -> None:
    with pytest.raises(PlanError, match="condition_bits"):
        Targets(4, 4, condition_bits=bits)


def test_recipes_that_judge_by_pictures_keep_8_bits_there() -> None:
    for name in ("default", "best", "low-bit", "mixed-precision"):
        assert dq.get("recipe", name).targets["condition_bits"] == 8


def test_layers_off_the_samples_path_are_told_apart(case) -> None:
    context = PassContext(*case, Targets())
    path = {name for names in layers_by_input(context) for name in names}
    assert not path & CONDITIONS
    assert {name for names in layers_by_input(context, everywhere=True) for name in names} == path | CONDITIONS
