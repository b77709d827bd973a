from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from toy_spaces import toy_space

from dq_plugins.errors import BudgetError
from dq_plugins.passes.allocation.problem import error_of
from dq_plugins.passes.steps.joint_program import JointProgram, best_widths
from dq_plugins.passes.steps.space import Candidate, Space
from dq_plugins.quantized.candidates import Entry


class Costs:
    """Costs of steps by formula, in place of measured ones."""

    def __init__(self, nodes, seed):
        self.nodes = nodes
        rng = np.random.default_rng(seed)
        self._weight = rng.uniform(0.5, 2.0, len(nodes) + 1)

    def start(self, node):
        return 0.2 * (len(self.nodes) - 1 - node)

    def error(self, start, end):
        gap = start + 1 if end == -1 else start - end
        return 0.05 * gap**2 * self._weight[end]

    def gain(self, start, end):
        gap = start + 1 if end == -1 else start - end
        return 0.1 * gap * self._weight[start]


def program(seed, layers=2):
    space = toy_space(seed, layers=layers)
    rng = np.random.default_rng(seed)
    noise = {
        Entry(layer.name, operand, bits): float(rng.uniform(0.5, 3)) * 4.0**-bits * 50
        for layer in space.layers
        for operand in ("weight", "activation")
        for bits in (4, 8)
    }
    return JointProgram(space, Costs(space.intervals[2].grid, seed), noise, 0.7)


def everything(space):
    for intervals in space.intervals.values():
        for steps in product(*map(range, intervals.sizes)):
            for widths in product(*map(range, space.choice_counts)):
                yield Candidate(steps, widths)


@pytest.mark.parametrize("seed", range(4))
def test_it_finds_the_optimum_of_its_program(seed):
    joint = program(seed)
    best = min(sum(joint.predicted(c)) for c in everything(joint.space) if joint.space.fits(c))
    solution = joint.solve()
    assert solution.status == "optimal"
    assert joint.space.fits(solution.candidate)
    # sums are rounded to 8192 levels each
    assert solution.predicted == pytest.approx(best, rel=3e-3)
    assert solution.bound <= solution.predicted


def test_steps_and_bits_are_traded_against_each_other():
    joint = program(0)
    by_steps = joint.solve().by_steps
    assert set(by_steps) == {2, 3}
    assert joint.solve(only=(2,)).predicted == pytest.approx(by_steps[2])


def test_timesteps_alone_need_no_layers():
    joint = program(1)
    space = Space(joint.space.intervals, (), 1.0)
    alone = JointProgram(space, joint.transitions, {})
    solution = alone.solve()
    best = min(sum(alone.predicted(c)) for c in everything(space))
    assert solution.predicted == pytest.approx(best, rel=3e-3)


def test_best_widths_use_the_budget_of_their_number_of_steps():
    joint = program(2, layers=3)
    losses = []
    for count in (2, 3):
        genes = best_widths(joint.space, joint.noise, count)
        candidate = Candidate((0,) * count, genes)
        assert joint.space.fits(candidate)
        losses.append(sum(error_of(joint.noise, n, w) for n, w in joint.space.widths(candidate).items()))
    assert losses[0] < losses[1]


def test_a_width_without_measured_noise_is_refused():
    joint = program(0)
    noise = {e: v for e, v in joint.noise.items() if e != Entry("l0", "weight", 8)}
    with pytest.raises(BudgetError, match="layer 'l0' have 8-bit weights, whose sensitivity was not measured"):
        best_widths(joint.space, noise, 2)


def test_every_number_of_steps_has_an_optimum_of_its_own():
    joint = program(0)
    solution = joint.solve()
    assert {count: len(c.steps) for count, c in solution.optima.items()} == {2: 2, 3: 3}
    assert solution.candidate in solution.optima.values()
    for count, candidate in solution.optima.items():
        assert joint.solve(only=(count,)).candidate == candidate
