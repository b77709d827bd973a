from __future__ import annotations

import numpy as np
from choice_programs import network_program, small_programs
from hypothesis import given, settings

from dq_plugins.solvers import ChoiceProgram
from dq_plugins.solvers.quick import greedy, greedy_choice, start_of, threshold, threshold_choice
from dq_plugins.testing.solver_conformance import enumerated


@given(program=small_programs())
@settings(max_examples=150, deadline=None)
def test_baselines_stay_within_budgets_and_never_beat_the_optimum(program: ChoiceProgram):
    _, best = enumerated(program)
    for rule in (greedy, threshold):
        found = rule(program)
        if found.choice.size:
            assert program.feasible(found.choice)
            assert found.objective >= best
        assert found.bound <= best


def test_greedy_stops_where_no_single_change_fits():
    program = network_program(20)
    choice = greedy_choice(program)
    assert choice is not None
    assert program.value(choice) < program.value(program.cheapest(program.budgets[0].cost))
    for column in range(len(program.error)):
        changed = choice.copy()
        changed[program.set_of[column]] = column
        assert program.value(changed) >= program.value(choice) or not program.feasible(changed)


def test_greedy_says_which_budget_holds_it_back_too():
    assert greedy(network_program(20)).binding


def test_of_columns_that_cost_the_same_the_one_with_less_error_is_taken():
    # a feasible start has no room to improve: cost 2 of both columns of 'a' is all there is
    program = ChoiceProgram.of({"a": [9.0, 1.0], "b": [4.0]}, {"bits": ({"a": [2, 2], "b": [2]}, 4.0)})
    for found in (greedy_choice(program), threshold_choice(program)):
        assert found is not None
        assert found.tolist() == [1, 2]


def test_threshold_takes_the_cheapest_width_below_one_error():
    program = ChoiceProgram.of(
        {"a": [8.0, 2.0, 0.5], "b": [3.0, 1.0, 0.1]}, {"bits": ({"a": [2, 4, 8], "b": [2, 4, 8]}, 8.0)}
    )
    choice = threshold_choice(program)
    assert choice is not None
    # threshold 2.0 fits (4 + 4 bits); the next level, 1.0, would need 8 + 4
    assert choice.tolist() == [1, 4]


def test_search_starts_at_a_feasible_hint_only():
    program = network_program(20)
    finest, cheapest = program.cheapest(program.error), program.cheapest(program.budgets[0].cost)
    assert start_of(program, cheapest) is cheapest
    assert np.array_equal(start_of(program, finest), greedy_choice(program))
    assert np.array_equal(start_of(program, None), greedy_choice(program))
