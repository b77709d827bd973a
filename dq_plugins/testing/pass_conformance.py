"""Conformance of passes: one step that reads the denoiser and the calibration set and writes the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from torch import nn

from dq_plugins import registry
from dq_plugins.errors import RecipeError
from dq_plugins.hashing import weights_hash
from dq_plugins.plan import QuantPlan
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress, Recipe, Step, make_plan
from dq_plugins.registry import Kind
from dq_plugins.testing.conformance import Conformance, expect, refused
from dq_plugins.testing.denoiser import calibrated


@dataclass
class Observation:
    """What one run of a pass did.

    Attributes:
        plan: the plan at the end of the recipe.
        before: hash of the plan when the pass began.
        after: hash of the plan when the pass ended.
        progress: what it yielded.
        changed: what of the denoiser is not as it was before the recipe ran.
    """

    plan: QuantPlan
    before: str = ""
    after: str = ""
    progress: list[Any] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


class PassConformance(Conformance):
    """A pass runs after those it requires, decides by its inputs alone, and leaves the denoiser as it was.

    Attributes:
        options: options the pass is made with.
        before: passes to run before it beside those it requires, with their options.
    """

    kind: ClassVar[Kind] = "pass"
    before: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def steps(self) -> tuple[Step, ...]:
        """This pass after everything it requires, each once."""
        ordered: dict[str, Mapping[str, Any]] = {}

        def visit(name: str) -> None:
            for required in registry.get("pass", name).requires:
                visit(required)
            ordered.setdefault(name, self.options if name == self.name else self.before.get(name, {}))

        for name in (*self.before, self.name):
            visit(name)
        return tuple(Step(name, options) for name, options in ordered.items())

    def runs(self) -> tuple[Observation, Observation]:
        """Two runs on a tiny denoiser with one seed and two global random states; made once for the suite."""
        return _two_runs(type(self))

    def test_it_is_a_pass_class_under_its_registered_name(self) -> None:
        found = self.plugin
        is_pass = isinstance(found, type) and issubclass(found, Pass)
        expect(is_pass, f"{self.name!r} is {found!r}; expected a subclass of dq_plugins.recipe.Pass")
        expect(found.name == self.name, f"the pass registered as {self.name!r} has the name {found.name!r}")

    def test_options_have_defaults(self) -> None:
        """`PassOptions` with a default for everything, so that a recipe may name the pass alone."""
        declared = self.plugin.Options
        expect(issubclass(declared, PassOptions), f"Options of {self.name!r} is {declared!r}; expected a PassOptions")
        needed = {name for name, each in declared.model_fields.items() if each.is_required()} - set(self.options)
        expect(not needed, f"options of {self.name!r} without a default: {', '.join(sorted(needed))}")

    def test_unknown_option_is_refused(self) -> None:
        with refused(f"the option 'no_such_option' by the pass {self.name!r}", RecipeError):
            self.plugin(**self.options, no_such_option=1)

    def test_passes_it_requires_exist(self) -> None:
        """What it requires is registered; what it comes ``after`` may belong to a package that is not installed."""
        unknown = [name for name in self.plugin.requires if name not in registry.names("pass")]
        expect(not unknown, f"the pass {self.name!r} requires {', '.join(unknown)}, which no one registers")

    def test_plan_is_valid_and_survives_a_round_trip(self) -> None:
        plan = self.runs()[0].plan.validate()
        with TemporaryDirectory() as folder:
            again = QuantPlan.load(plan.save(Path(folder) / "plan"))
        expect(again == plan, f"the plan changed when it was saved and loaded after the pass {self.name!r}")

    def test_it_decides_something(self) -> None:
        """What a pass decides is in the plan, or it did not happen."""
        run = self.runs()[0]
        expect(run.after != run.before, f"the pass {self.name!r} left no trace in the plan")

    def test_same_seed_same_plan(self) -> None:
        one, other = self.runs()
        expect(one.plan == other.plan, f"the pass {self.name!r} made two plans from one seed")

    def test_denoiser_is_left_as_it_was(self) -> None:
        changed = self.runs()[0].changed
        expect(not changed, f"the pass {self.name!r} changed the {' and the '.join(changed)} of the denoiser")

    def test_figure_is_drawn_from_the_plan(self) -> None:
        """None, or a matplotlib figure with a caption, from a plan that was reloaded."""
        with TemporaryDirectory() as folder:
            plan = QuantPlan.load(self.runs()[0].plan.save(Path(folder) / "plan"))
        drawn = self.plugin.figure(plan)
        if drawn is not None:
            figure, caption = drawn
            expect(hasattr(figure, "savefig"), f"the figure of {self.name!r} is {figure!r}; expected one of matplotlib")
            expect(caption and isinstance(caption, str), f"the figure of {self.name!r} has no caption")

    def test_progress_goes_forward(self) -> None:
        """What a pass yields is `Progress` that never passes its total, and goes back only to 0: to a new phase."""
        progress = self.runs()[0].progress
        odd = [each for each in progress if not isinstance(each, Progress)]
        expect(not odd, f"the pass {self.name!r} yields {odd[:1]}; expected dq_plugins.recipe.Progress")
        done = [each.done for each in progress]
        forward = all(after >= before or after == 0 for before, after in pairwise(done))
        expect(forward, f"the progress of {self.name!r} goes back: {done}")
        expect(all(each.done <= each.total for each in progress), f"the progress of {self.name!r} goes past its total")


@lru_cache(maxsize=64)
def _two_runs(suite: type[PassConformance]) -> tuple[Observation, Observation]:
    """Run a suite's steps twice, with the global random state set to different seeds."""
    made = suite()
    recipe = Recipe("conformance", "", made.steps())
    with calibrated() as (denoiser, calibration):
        denoiser.train()

        def once(global_seed: int) -> Observation:
            torch.manual_seed(global_seed)
            state = _state(denoiser)
            watched, seen = _watched(made.plugin)
            with registry.temporary("pass", made.name, watched):
                seen.plan = make_plan(denoiser, calibration, recipe, seed=7, progress=False)
            seen.changed = [what for what, value in _state(denoiser).items() if value != state[what]]
            return seen

        return once(0), once(1)


def _watched(passed: type[Pass]) -> tuple[type[Pass], Observation]:
    """A subclass of a pass that notes what it does."""
    seen = Observation(plan=None)  # type: ignore[arg-type]  # known when the recipe has run

    class Watched(passed):  # type: ignore[misc, valid-type]
        """The pass, with its progress and the plan's hash before and after noted."""

        def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
            seen.before = plan.hash
            for step in super().run(plan, context) or ():
                seen.progress.append(step)
                yield step
            seen.after = plan.hash

    return Watched, seen


def _state(denoiser: nn.Module) -> dict[str, Any]:
    """What a pass must leave as it is, by name."""
    modules = dict(denoiser.named_modules())
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")
    return {
        "weights": weights_hash(denoiser),
        "modules": {name: type(module) for name, module in modules.items()},
        "hooks": {name: sum(len(getattr(module, each)) for each in hooks) for name, module in modules.items()},
        "forward": {name: "forward" in vars(module) for name, module in modules.items()},
        "training mode": {name: module.training for name, module in modules.items()},
        "switches of the gradients": [parameter.requires_grad for parameter in denoiser.parameters()],
    }
