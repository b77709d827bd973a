from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

from dq_plugins.errors import BudgetError
from dq_plugins.passes.steps.intervals import StepIntervals
from dq_plugins.passes.steps.joint import JointOptions, JointSearch
from dq_plugins.passes.steps.space import LayerChoices, Space
from dq_plugins.progress import finish

GRID = (10.0, 20.0, 30.0, 40.0)


class Costs:
    """The fewer steps, the lower the prediction."""

    nodes = GRID

    def start(self, node):
        return 0.0

    def error(self, start, end):
        return 1.0

    def gain(self, start, end):
        return 0.0


class Own:
    def own(self, count):
        return GRID[:count][::-1]


@dataclass
class Images:
    """Measured, more steps are better, and of as many steps the earliest timesteps."""

    space: Space
    rungs = 1
    stepper: ClassVar[Own] = Own()

    def __call__(self, candidate, rung):
        return {"loss": 10.0 / len(candidate.steps) + sum(candidate.steps), "calls": 1.0}


def search(method="both", budget=1e9, folder=None):
    space = Space({2: StepIntervals(GRID, (0, 2)), 3: StepIntervals(GRID, (0, 1, 2))}, (), budget)
    few = JointOptions(population=8, parents=2, mutants=4, crossovers=2, generations=3, search=method)
    return JointSearch(Images(space), {}, Costs(), few, folder=folder)


def test_the_program_is_asked_for_every_number_of_steps_and_the_images_decide():
    found = finish(search("exact").run())
    assert len(found.solution.candidate.steps) == 2  # what the program takes for best
    assert len(found.best.candidate.steps) == 3
    assert found.chosen_by == "exact"
    assert found.state is None


def test_the_evolution_is_not_worse_than_where_it_begins():
    found = finish(search().run())
    assert found.scored["evolution"].loss <= found.scored["exact"].loss
    assert found.best.loss == min(each.loss for each in found.scored.values())


def test_evolution_alone_needs_no_costs_of_steps():
    alone = search("evolution")
    found = finish(JointSearch(alone.fitness, {}, None, alone.options).run())
    assert found.solution is None
    assert found.chosen_by == "evolution"


def test_another_budget_has_checkpoints_of_its_own(tmp_path):
    narrower = search(folder=tmp_path / "search").within(0.5)
    assert narrower.space.budget == 5e8
    assert narrower.folder == tmp_path / "search-0.5"


def test_a_share_of_the_budget_that_nothing_fits_is_refused():
    layers = (LayerChoices("l", (8,), (8,), np.array([[100.0]])),)
    space = Space({2: StepIntervals(GRID, (0, 2))}, layers, 300.0)
    joint = JointSearch(Images(space), {}, Costs(), JointOptions())
    assert joint.within(0.7).space.budget == pytest.approx(210.0)
    with pytest.raises(BudgetError, match="no schedule fits"):
        joint.within(0.6)


def test_other_images_decide_between_the_answers():
    """The search's images want three steps, the others two."""

    class Others(Images):
        def __call__(self, candidate, rung):
            return {"loss": float(len(candidate.steps)), "calls": 1.0}

    alone = search("exact")
    assert len(finish(alone.run()).best.candidate.steps) == 3
    judged = replace(alone, judged=Others(alone.space))
    found = finish(judged.run())
    assert len(found.best.candidate.steps) == 2
    assert found.best.loss == 2.0
