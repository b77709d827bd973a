"""A recipe: a named, ordered list of passes with options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dq_plugins.errors import RecipeError
from dq_plugins.recipe.pass_protocol import Pass


@dataclass(frozen=True)
class Step:
    """One pass of a recipe, by registered name, with the options the recipe gives it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """An ordered list of passes.

    Attributes:
        name: the name it is registered under.
        summary: one line for ``dq-plugins list``.
        steps: the passes, in order.
        targets: what the run aims at where the caller does not say, by field of `dq_plugins.plan.Targets`.

    Example:
        >>> Recipe("mine", "8-bit weights only", (Step("weight-ranges", {"method": "minmax"}),)).passes()
        ['weight-ranges']
    """

    name: str
    summary: str
    steps: tuple[Step, ...]
    targets: Mapping[str, Any] = field(default_factory=dict)

    def passes(self) -> list[str]:
        """Names of the passes, in order."""
        return [step.name for step in self.steps]

    def with_options(self, options: Mapping[str, Mapping[str, Any]]) -> Recipe:
        """The recipe with options overridden, by pass name.

        Raises:
            RecipeError: a pass is named that the recipe does not have.
        """
        wrong = [name for name, given in options.items() if not isinstance(given, Mapping)]
        if wrong:
            raise RecipeError(f"options of pass {wrong[0]!r} are values by name, got {options[wrong[0]]!r}")
        unknown = sorted(set(options) - set(self.passes()))
        if unknown:
            raise RecipeError(f"recipe {self.name!r} has no pass {unknown[0]!r}; it runs: {', '.join(self.passes())}")
        steps = tuple(Step(s.name, {**s.options, **options.get(s.name, {})}) for s in self.steps)
        return replace(self, steps=steps)

    def check_order(self, classes: Mapping[str, type[Pass]]) -> None:
        """Raise `RecipeError` if a pass comes before one it requires or must follow."""
        names = self.passes()
        if not names:
            raise RecipeError(f"recipe {self.name!r} has no passes")
        for position, name in enumerate(names):
            missing = [r for r in classes[name].requires if r not in names[:position]]
            if missing:
                raise RecipeError(f"recipe {self.name!r}: pass {name!r} needs {missing[0]!r} to run before it")
            late = [a for a in classes[name].after if a in names[position + 1 :]]
            if late:
                raise RecipeError(f"recipe {self.name!r}: pass {name!r} must come after {late[0]!r}")
