"""The exact program with drift: brute force on small problems, beam search and greedy on larger ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from choice_programs import network_program, small_programs
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dq_plugins.errors import BudgetError
from dq_plugins.solvers import Budget, ChoiceProgram
from dq_plugins.solvers.drifting import DriftingProgram, beam_search, greedy_drifting, solve_drifting


def drifting(linear: ChoiceProgram, seed: int, directions: int = 2, strength: float = 1.0) -> DriftingProgram:
    """With random drifts: about as large as the errors, of either sign."""
    rng = np.random.default_rng(seed)
    size = np.sqrt(linear.error)[:, None] * strength
    return DriftingProgram(linear, size * rng.normal(size=(len(linear.error), directions)))


def brute_force(program: DriftingProgram) -> float:
    choices = (np.array(c) for c in itertools.product(*program.linear.choice_sets()))
    return min((program.value(c) for c in choices if program.linear.feasible(c)), default=np.inf)


def of_errors(*sets: list[float]) -> ChoiceProgram:
    return ChoiceProgram.of({f"m{i}": errors for i, errors in enumerate(sets)}, {})


@settings(max_examples=60, deadline=None)
@example(of_errors([0, 0.5, 0], [0.75], [0.125, 0.125, 0.625], [0, 0.125, 0.25], [2.5]), 47, 3.0)
@example(of_errors([0], [0, 0, 0], [0.125, 0.125], [0], [0, 0, 0, 0.125]), 15, 1.0)
@given(small_programs(), st.integers(0, 1000), st.sampled_from([0.0, 0.3, 1.0, 3.0]))
def test_it_is_the_optimum_of_brute_force(linear, seed, strength):
    program = drifting(linear, seed, strength=strength)
    least, found = brute_force(program), solve_drifting(program)
    if not np.isfinite(least):
        assert found.status == "infeasible"
        return
    assert found.status == "optimal"
    assert linear.feasible(found.choice)
    assert found.objective == pytest.approx(least, rel=1e-5, abs=1e-9)
    assert found.bound <= least + 1e-9
    for other in (greedy_drifting(program), beam_search(program)):
        assert other is None or (linear.feasible(other) and program.value(other) >= least - 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_on_larger_problems_it_is_never_worse_than_beam_search_and_greedy(seed):
    program = drifting(network_program(layers=40, seed=seed, room=0.2 + 0.2 * seed), seed, 3)
    found = solve_drifting(program, seconds=1.0)
    others = [program.value(c) for c in (greedy_drifting(program), beam_search(program, 32)) if c is not None]
    assert others
    assert program.linear.feasible(found.choice)
    assert found.objective <= min(others)
    assert 0 <= found.bound <= found.objective


def test_drifts_that_take_each_other_away_are_bought_together():
    """Each cheap column drifts by 1, one up and one down: either alone costs 1, both together nothing."""
    linear = ChoiceProgram.of({n: [0.0, 0.4] for n in "ab"}, {"bits": ({n: [2.0, 4.0] for n in "ab"}, 8.0)})
    program = DriftingProgram(linear, np.array([[1.0], [0.0], [-1.0], [0.0]]))
    found = solve_drifting(program)
    assert (found.objective, found.status, list(found.choice)) == (0.0, "optimal", [0, 2])


def test_a_wide_beam_is_exact_without_drift():
    """Then it is the dynamic program: partial choices that another one beats in cost and error cannot win."""
    rng = np.random.default_rng(0)
    cost, error = rng.integers(1, 9, 18).astype(float), rng.random(18)
    linear = ChoiceProgram(
        tuple("abcdef"), np.arange(7) * 3, error, (Budget("b", cost, cost.reshape(6, 3).min(1).sum() + 8),)
    )
    program = DriftingProgram(linear, np.zeros((18, 1)))
    found = beam_search(program, width=10_000)
    assert found is not None
    assert program.value(found) == pytest.approx(brute_force(program))


def test_what_cannot_be_met_says_what_could():
    linear = ChoiceProgram.of({n: [1.0, 0.4] for n in "ab"}, {"bits": ({n: [2.0, 4.0] for n in "ab"}, 3.0)})
    found = solve_drifting(DriftingProgram(linear, np.zeros((4, 1))))
    assert (found.status, found.nearest) == ("infeasible", {"bits": 4.0})
    with pytest.raises(BudgetError, match="nearest budget"):
        found.require()


def test_drifts_of_another_shape_are_refused():
    linear = ChoiceProgram.of({"a": [1.0, 0.4]})
    for drift in (np.zeros((3, 1)), np.zeros(2), np.full((2, 1), np.nan)):
        with pytest.raises(BudgetError, match="amplitudes"):
            DriftingProgram(linear, drift)
