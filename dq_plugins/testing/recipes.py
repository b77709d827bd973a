"""Conformance of recipes: a `dq_plugins.recipe.Recipe` that makes a complete plan of a denoiser."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from dq_plugins import registry
from dq_plugins.plan import QuantPlan
from dq_plugins.recipe import Recipe, make_plan
from dq_plugins.registry import Kind
from dq_plugins.testing.base import Conformance, expect
from dq_plugins.testing.denoiser import calibrated


class RecipeConformance(Conformance):
    """A recipe names registered passes in an order they accept, and its plan decides every layer."""

    kind: ClassVar[Kind] = "recipe"

    def make_plan(self, **options: Any) -> QuantPlan:
        """The recipe's plan of a tiny denoiser; ``options`` are those of `dq_plugins.make_plan`."""
        with calibrated() as (denoiser, calibration):
            return make_plan(denoiser, calibration, self.plugin, progress=False, **{**self.options, **options})

    def test_it_is_a_recipe_under_its_registered_name(self) -> None:
        """A `Recipe` object, not a function that makes one."""
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
        """Valid, and not empty."""
        plan = self.make_plan().validate()
        expect(any(layer.weight for layer in plan.layers.values()), f"the recipe {self.name!r} quantizes no weight")
        expect(plan.recipe == self.name, f"the plan says it is of recipe {plan.recipe!r}")

    def test_same_seed_same_plan(self) -> None:
        """Byte for byte, whatever the global random state."""
        hashes = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            hashes.append(self.make_plan(seed=7).hash)
        expect(hashes[0] == hashes[1], f"the recipe {self.name!r} made two plans from one seed")
