from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_spaces import toy_space

from dq_plugins.errors import BudgetError
from dq_plugins.passes.steps.intervals import StepIntervals
from dq_plugins.passes.steps.space import Candidate, LayerChoices, Space
from dq_plugins.quantized.width import Width

INTERVALS = {2: StepIntervals((10.0, 20.0, 30.0, 40.0), (0, 2)), 3: StepIntervals((10.0, 20.0, 30.0, 40.0), (0, 1, 2))}


def two_layers(budget=1e9):
    costs = [macs * np.outer((4, 8), (4, 6, 8)).astype(float) for macs in (10, 100)]
    return Space(INTERVALS, tuple(LayerChoices(f"l{i}", (4, 8), (4, 6, 8), c) for i, c in enumerate(costs)), budget)


def test_cost_is_the_hand_count():
    space = two_layers()
    candidate = Candidate((0, 0, 0), (0, 1, 1, 2))
    assert space.cost(candidate) == 3 * (10 * 4 * 6 + 100 * 8 * 8)
    assert space.widths(candidate) == {"l0": Width(4, 6), "l1": Width(8, 8)}
    assert space.timesteps(candidate) == (30.0, 20.0, 10.0)


def test_a_candidate_is_read_back_from_its_key():
    candidate = Candidate((1, 0), (1, 0, 0, 2))
    assert Candidate.parse(candidate.key) == candidate


@given(st.integers(0, 2**31), st.floats(0.3, 1.2), st.floats(0.01, 1.0))
def test_whatever_is_made_is_within_the_budget_and_the_choices(seed, budget, rate):
    space = toy_space(seed % 5, layers=3, budget=budget)
    rng = np.random.default_rng(seed)
    one, other = space.random(rng), space.random(rng)
    for candidate in (one, other, space.mutate(rng, one, rate), space.cross(rng, one, other)):
        assert space.fits(candidate)
        sizes = space.intervals[len(candidate.steps)].sizes
        assert all(0 <= g < s for g, s in zip(candidate.steps, sizes, strict=True))
        assert all(0 <= g < m for g, m in zip(candidate.widths, space.choice_counts, strict=True))
        timesteps = space.timesteps(candidate)
        assert list(timesteps) == sorted(set(timesteps), reverse=True)


def test_mutation_of_everything_moves_steps_and_widths():
    space, rng = two_layers(), np.random.default_rng(0)
    parent = Candidate((0, 0, 0), (0, 0, 0, 0))
    children = [space.mutate(rng, parent, 1.0) for _ in range(40)]
    assert {len(c.steps) for c in children} == {2, 3}
    assert all(len({c.widths[i] for c in children}) > 1 for i in range(4))


def test_a_budget_that_nothing_fits_is_refused_with_the_least_that_does():
    cheapest = 2 * 110 * 16
    with pytest.raises(BudgetError, match=f"cost {cheapest}"):
        two_layers(budget=cheapest - 1)


def test_fewer_steps_are_taken_where_narrow_widths_are_not_enough():
    space = two_layers(budget=2 * 110 * 16)
    fitted = space.fit(np.random.default_rng(0), Candidate((0, 0, 1), (1, 2, 1, 2)))
    assert len(fitted.steps) == 2
    assert space.fits(fitted)


def test_what_a_call_costs_beside_its_layers_is_paid_at_every_step():
    space = replace(two_layers(), overhead=1000.0)
    candidate = Candidate((0, 0, 0), (0, 1, 1, 2))
    assert space.cost(candidate) == 3 * (1000 + 10 * 4 * 6 + 100 * 8 * 8)
    least = 2 * (1000 + 110 * 16)
    with pytest.raises(BudgetError, match=f"cost {least}"):
        replace(space, budget=least - 1)


@given(st.integers(0, 2**31))
def test_a_budget_is_kept_where_narrower_is_not_cheaper(seed):
    rng = np.random.default_rng(seed)
    layers = tuple(LayerChoices(f"l{i}", (4, 6, 8), (4, 8), rng.uniform(1, 10, (3, 2))) for i in range(3))
    least = 2 * sum(float(layer.cost.min()) for layer in layers)
    space = Space(INTERVALS, layers, least * float(rng.uniform(1.0001, 2)))
    assert all(space.fits(space.random(rng)) for _ in range(5))


def test_making_a_candidate_fit_takes_no_more_than_it_must():
    layers = (LayerChoices("l", (4, 6, 8), (8,), np.array([[5.0], [1.0], [9.0]])),)
    space = Space({2: INTERVALS[2]}, layers, budget=10.0)
    assert space.fit(np.random.default_rng(0), Candidate((0, 0), (2, 0))).widths == (0, 0)
    assert replace(space, budget=4.0).fit(np.random.default_rng(0), Candidate((0, 0), (2, 0))).widths == (1, 0)


def test_of_widths_that_cost_the_same_the_widest_is_the_cheapest():
    flat = LayerChoices("l0", (4, 8), (4, 8), np.array([[1.0, 1.0], [1.0, 2.0]]))
    space = Space(INTERVALS, (flat,), 1e9)
    assert space.cheapest == (1, 0)
    tight = replace(space, budget=2 * 1.0)
    # W8A8 costs 2: either gene may be narrowed, and there is no reason to narrow both
    made = {tight.fit(np.random.default_rng(seed), Candidate((0, 0), (1, 1))).widths for seed in range(8)}
    assert made == {(0, 1), (1, 0)}


def test_of_narrower_widths_that_cost_the_same_the_widest_is_taken():
    choices = LayerChoices("l0", (2, 4, 8), (8,), np.array([[1.0], [1.0], [2.0]]))
    space = Space(INTERVALS, (choices,), 2.0)
    assert space.fit(np.random.default_rng(0), Candidate((0, 0), (2, 0))).widths == (1, 0)
