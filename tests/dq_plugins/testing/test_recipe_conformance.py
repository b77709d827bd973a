from __future__ import annotations

import pytest
import torch

from dq_plugins import registry
from dq_plugins.plan import Section
from dq_plugins.recipe import Pass, Recipe, Step
from dq_plugins.testing.recipe_conformance import RecipeConformance


class Moody(Pass):
    name = "moody"
    after = ("weight-ranges",)

    def run(self, plan, context):
        plan.sections["moody"] = Section({"draw": float(torch.rand(()))})


WEIGHTS = Step("weight-ranges")
FAULTS = {
    "it is a recipe under its registered name": [Recipe("other", "x", (WEIGHTS,)), "weight-ranges"],
    "passes exist take their options and come in order": [
        Recipe("under-test", "x", (Step("no-such-pass"),)),
        Recipe("under-test", "x", (Step("weight-ranges", {"bitz": 4}),)),
        Recipe("under-test", "x", (Step("moody"), WEIGHTS)),
    ],
    "plan quantizes something and explains the rest": [Recipe("under-test", "x", (Step("moody"),))],
    "same seed same plan": [Recipe("under-test", "x", (WEIGHTS, Step("moody")))],
    "it says what it is": [Recipe("under-test", "", (WEIGHTS,))],
}


@pytest.fixture(autouse=True)
def _moody():
    with registry.temporary("pass", "moody", Moody):
        yield


def test_a_sound_recipe_passes(failures):
    assert failures(RecipeConformance, Recipe("under-test", "weights only", (WEIGHTS,))) == set()


@pytest.mark.parametrize(("caught", "recipe"), [(name, each) for name, many in FAULTS.items() for each in many])
def test_a_fault_is_caught_by_the_test_that_is_named_after_it(failures, caught, recipe):
    assert caught in failures(RecipeConformance, recipe)


def test_every_check_has_a_fault_that_it_catches():
    own = {name.removeprefix("test_").replace("_", " ") for name in vars(RecipeConformance) if "test_" in name}
    assert own <= set(FAULTS)
