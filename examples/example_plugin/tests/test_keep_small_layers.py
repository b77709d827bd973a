from __future__ import annotations

from dq_plugins.recipe import Recipe, Step, make_plan
from dq_plugins.testing import PassConformance
from dq_plugins.testing.denoiser import calibrated


class TestConformance(PassConformance):
    name = "keep-small-layers"


def test_exactly_the_small_layers_are_kept_and_say_why():
    recipe = Recipe("mine", "", (Step("weight-ranges"), Step("keep-small-layers", {"fewer_than": 200})))
    with calibrated() as (denoiser, calibration):
        plan = make_plan(denoiser, calibration, recipe, progress=False)
    small = {name for name in plan.layers if denoiser.get_submodule(name).weight.numel() < 200}
    assert small
    assert {name for name, layer in plan.layers.items() if layer.weight is None} == small
    assert all("fewer than 200" in plan.layers[name].why for name in small)
