from __future__ import annotations

import itertools

import numpy as np
import pytest
from choice_programs import network_program, small_programs
from hypothesis import given, settings

from dq_plugins.solvers import Budget, ChoiceProgram, Solver
from dq_plugins.solvers.cp_sat import cp_sat
from dq_plugins.solvers.linear_program import relaxation
from dq_plugins.solvers.mip import mip
from dq_plugins.solvers.quick import greedy, threshold
from dq_plugins.testing.solver_conformance import enumerated

EXACT: list[Solver] = [cp_sat, mip]


@pytest.mark.parametrize("solver", EXACT)
@given(program=small_programs())
@settings(max_examples=120, deadline=None)
def test_optimum_is_that_of_brute_force(solver: Solver, program: ChoiceProgram):
    (_, best), found = enumerated(program), solver(program)
    if best == np.inf:
        assert found.status == "infeasible"
        assert found.choice.size == 0
        assert found.objective == found.bound == np.inf
    else:
        assert found.status == "optimal"
        assert found.objective == pytest.approx(best, abs=found.tolerance + 1e-12)
        assert found.tolerance <= 1e-4
        assert program.feasible(found.choice)
        assert found.bound <= best + 1e-12
        assert found.objective == program.value(found.choice)


@pytest.mark.parametrize("solver", EXACT)
def test_budgets_of_a_network_hold_to_the_last_unit_and_the_proof_closes(solver: Solver):
    program = network_program()
    found = solver(program)
    assert found.status == "optimal"
    assert all(budget.used(found.choice) <= budget.limit for budget in program.budgets)
    assert found.gap <= 1e-4
    assert found.objective < greedy(program).objective < threshold(program).objective


def test_exact_solvers_agree_on_a_network():
    program = network_program(seed=3)
    assert cp_sat(program).objective == pytest.approx(mip(program).objective, rel=1e-5)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_optimum(workers: int):
    program = network_program(seed=5)
    assert cp_sat(program, workers=workers).objective == pytest.approx(mip(program).objective, rel=1e-5)


def test_tolerance_is_kept_and_reported():
    program = network_program(seed=1)
    exact, loose = cp_sat(program), cp_sat(program, tolerance=1e-2)
    assert exact.objective <= loose.objective <= exact.objective * 1.0101
    assert loose.gap <= 1e-2
    assert loose.tolerance == pytest.approx(1e-2 * loose.objective, rel=1e-3)


def test_time_limit_gives_a_feasible_choice_and_its_gap():
    found = cp_sat(network_program(300, seed=2), seconds=1e-6)
    assert found.status == "feasible"
    assert found.bound < found.objective
    assert 0 < found.gap < 0.05


def test_hint_is_used_where_it_is_the_best_known():
    program = network_program(300, seed=2)
    best = cp_sat(program)
    assert cp_sat(program, hint=best.choice, seconds=1e-6).objective == best.objective


@given(program=small_programs())
@settings(max_examples=80, deadline=None)
def test_relaxation_bounds_the_optimum_and_prices_are_not_negative(program: ChoiceProgram):
    prices, bound = relaxation(program)
    assert bound <= enumerated(program)[1] + 1e-9
    assert (prices >= 0).all()


def test_a_price_is_what_one_more_unit_saves_in_the_relaxation():
    program = network_program()
    prices, bound = relaxation(program)
    for price, budget in zip(prices, program.budgets, strict=True):
        little = budget.limit * 1e-6
        _, looser = relaxation(program.with_limits({budget.name: budget.limit + little}))
        assert bound - looser == pytest.approx(price * little, rel=1e-2, abs=1e-12)


def test_infeasible_hint_is_ignored():
    program = network_program(seed=1)
    finest = program.cheapest(program.error)
    assert not program.feasible(finest)
    assert cp_sat(program, hint=finest).objective == cp_sat(program).objective


def test_binding_budgets_are_those_that_would_buy_less_error():
    error = {"a": [9.0, 1.0], "b": [4.0, 0.5]}
    tight, slack = {"a": [2, 4], "b": [2, 4]}, {"a": [1, 1], "b": [1, 1]}
    found = cp_sat(ChoiceProgram.of(error, {"bits": (tight, 6), "layers": (slack, 100)}))
    assert found.binding == ("bits",)
    assert [use.used for use in found.uses] == [6, 2]


def test_a_choice_that_slips_over_a_budget_by_less_than_scip_sees_is_refused_and_another_one_searched():
    saved, cost = {"a": 6.0, "b": 4.0, "c": 4.0, "d": 3.9}, {"a": 2.0, "b": 1.5, "c": 1.5, "d": 1.4}
    program = ChoiceProgram.of(
        {name: [10.0, 10.0 - value] for name, value in saved.items()},
        {"ms": ({name: [0.0, value] for name, value in cost.items()}, 3.0 - 1e-8)},
    )
    # b and c would cost 3; the greedy choice is a alone; b (or c) and d are the best that fits
    found = mip(program)
    assert found.objective == pytest.approx(40 - 7.9)
    assert program.feasible(found.choice)
    assert (found.status, found.bound) == ("feasible", pytest.approx(40 - 8, abs=1e-4))  # as far as SCIP can say


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("limit", [1e20, 1e308])
def test_a_limit_that_nothing_reaches_is_no_limit(solver: Solver, limit: float):
    program = ChoiceProgram.of({"a": [9.0, 1.0]}, {"bits": ({"a": [2.5, 4.5]}, limit)})
    found = solver(program)
    assert (found.status, found.objective, found.binding) == ("optimal", 1.0, ())


def test_negative_errors_are_allowed_so_that_scores_can_be_maximised():
    program = ChoiceProgram.of({"a": [-1.0, -5.0], "b": [-2.0, -3.0]}, {"bits": ({"a": [1, 2], "b": [1, 2]}, 3)})
    assert cp_sat(program).objective == -7


def test_float_budget_is_never_exceeded_at_its_exact_limit():
    rng = np.random.default_rng(0)
    for _ in range(30):
        cost = rng.uniform(0, 1e-3, 20)
        program = ChoiceProgram(tuple("abcde"), np.arange(6) * 4, rng.uniform(0, 1, 20), ())
        limit = Budget("ms", cost, 0.0).used(program.start[:-1] + rng.integers(0, 4, 5))
        limited = ChoiceProgram(program.names, program.start, program.error, (Budget("ms", cost, limit),))
        feasible = [c for c in map(np.array, itertools.product(*limited.choice_sets())) if limited.feasible(c)]
        best = min(map(limited.value, feasible))
        found = cp_sat(limited)
        assert limited.feasible(found.choice)
        assert best <= found.objective + 1e-12
        eased = limited.with_limits({"ms": limit * (1 - 1e-9)})
        assert found.objective <= enumerated(eased)[1] + 1e-9
