"""Conformance of recipes: a `dq_plugins.recipe.Recipe` that makes a complete plan of a denoiser."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import torch

from dq_plugins import registry
from dq_plugins.plan import QuantPlan
from dq_plugins.recipe import Recipe, make_plan
from dq_plugins.registry import Kind
from dq_plugins.testing.conformance import Conformance, expect
from dq_plugins.testing.denoiser import calibrated


class RecipeConformance(Conformance):
    """A recipe names registered passes in an order they accept, and its plan decides every layer.

    Attributes:
        options: keyword arguments of `dq_plugins.make_plan`, such as ``{"weight_bits": 4}``.
    """

    kind: ClassVar[Kind] = "recipe"

    def plans(self) -> tuple[QuantPlan, QuantPlan]:
        """Plans of a tiny denoiser by one seed in two global random states; made once for the suite."""
        return _two_plans(type(self))

    def test_it_is_a_recipe_under_its_registered_name(self) -> None:
        found = self.plugin
        expect(isinstance(found, Recipe), f"{self.name!r} is a {type(found).__name__}; expected a Recipe object")
        expect(found.name == self.name, f"the recipe registered as {self.name!r} has the name {found.name!r}")

    def test_passes_exist_take_their_options_and_come_in_order(self) -> None:
        """Found before anything is calibrated."""
        classes = {step.name: registry.get("pass", step.name) for step in self.plugin.steps}
        self.plugin.check_order(classes)
        for step in self.plugin.steps:
            classes[step.name](**step.options)

    def test_plan_quantizes_something_and_explains_the_rest(self) -> None:
        plan = self.plans()[0].validate()
        expect(any(layer.weight for layer in plan.layers.values()), f"the recipe {self.name!r} quantizes no weight")
        expect(plan.recipe == self.name, f"the plan says it is of recipe {plan.recipe!r}")

    def test_same_seed_same_plan(self) -> None:
        one, other = self.plans()
        expect(one == other, f"the recipe {self.name!r} made two plans from one seed")


@lru_cache(maxsize=64)
def _two_plans(suite: type[RecipeConformance]) -> tuple[QuantPlan, QuantPlan]:
    made = suite()

    def once(global_seed: int) -> QuantPlan:
        torch.manual_seed(global_seed)
        return make_plan(denoiser, calibration, made.plugin, progress=False, **{"seed": 7, **made.options})

    with calibrated() as (denoiser, calibration):
        return once(0), once(1)
