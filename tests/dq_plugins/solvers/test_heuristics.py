from __future__ import annotations

import numpy as np
from choice_programs import network_program, small_programs
from hypothesis import given, settings

from dq_plugins.solvers import ChoiceProgram
from dq_plugins.solvers.baselines import exhaustive, greedy, threshold
from dq_plugins.solvers.heuristics import improve, threshold_choice
from dq_plugins.solvers.relaxation import lagrangian, relax, undominated


@given(program=small_programs())
@settings(max_examples=150, deadline=None)
def test_baselines_stay_within_budgets_and_never_beat_the_optimum(program: ChoiceProgram):
    best = exhaustive(program)
    for rule in (greedy, threshold):
        found = rule(program)
        if found.choice.size:
            assert program.feasible(found.choice)
            assert found.objective >= best.objective
        assert found.bound <= best.objective


@given(program=small_programs())
@settings(max_examples=150, deadline=None)
def test_dropping_dominated_columns_keeps_the_optimum(program: ChoiceProgram):
    smaller, _ = program.restrict(undominated(program))
    assert exhaustive(smaller).objective == exhaustive(program).objective


@given(program=small_programs())
@settings(max_examples=100, deadline=None)
def test_no_price_makes_the_bound_exceed_the_optimum(program: ChoiceProgram):
    best = exhaustive(program).objective
    assert relax(program).bound <= best + 1e-9
    for price in (0.0, 0.1, 3.0):
        assert lagrangian(program, np.full(len(program.budgets), price)).bound <= best + 1e-9


def test_improving_stops_where_no_single_change_fits():
    program = network_program(20)
    start = program.cheapest(sum(b.cost / b.limit for b in program.budgets))
    better = improve(program, start)
    assert program.value(better) < program.value(start)
    for column in range(len(program.error)):
        changed = better.copy()
        changed[program.menu_of[column]] = column
        assert program.value(changed) >= program.value(better) or not program.feasible(changed)


def test_threshold_takes_the_cheapest_width_below_one_error():
    program = ChoiceProgram.of(
        {"a": [8.0, 2.0, 0.5], "b": [3.0, 1.0, 0.1]}, {"bits": ({"a": [2, 4, 8], "b": [2, 4, 8]}, 8.0)}
    )
    choice = threshold_choice(program)
    assert choice is not None
    # threshold 2.0 fits (4 + 4 bits); the next level, 1.0, would need 8 + 4
    assert choice.tolist() == [1, 4]
