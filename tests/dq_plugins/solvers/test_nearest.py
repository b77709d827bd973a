from __future__ import annotations

import itertools

import numpy as np
import pytest
from choice_programs import network_program, small_programs
from hypothesis import assume, given, settings

from dq_plugins.errors import BudgetError
from dq_plugins.solvers import ChoiceProgram
from dq_plugins.solvers.answer import nearest_limits
from dq_plugins.solvers.cp_sat import cp_sat
from dq_plugins.solvers.program import Budget
from dq_plugins.testing.solver_conformance import enumerated


def overshoot(program: ChoiceProgram, used: dict[str, float]) -> float:
    units = {b.name: max(b.limit, b.used(program.cheapest(b.cost))) or b.cost.max() or 1 for b in program.budgets}
    return max(max(used[b.name] - b.limit, 0) / units[b.name] for b in program.budgets)


@given(program=small_programs())
@settings(max_examples=80, deadline=None)
def test_nearest_budgets_can_be_met_and_none_are_nearer(program: ChoiceProgram):
    assume(enumerated(program)[1] == np.inf)
    nearest = nearest_limits(program)
    assert cp_sat(program.with_limits(nearest)).status == "optimal"
    choices = (np.array(c) for c in itertools.product(*program.choice_sets()))
    least = min(overshoot(program, {b.name: b.used(c) for b in program.budgets}) for c in choices)
    asked = {b.name: nearest.get(b.name, b.limit) for b in program.budgets}
    assert overshoot(program, asked) <= least * (1 + 1e-3) + 1e-9


def test_a_choice_that_a_finer_resolution_missed_is_found():
    costs = [7.0, 0, 7, 0, 10, 13, 13, 3, 0, 0, 0, 48], [0.0, 46, 0, 40, 37, 0, 0, 0, 10, 10, 10, 3]
    budgets = tuple(
        Budget(f"b{i}", np.array(c), limit) for i, (c, limit) in enumerate(zip(costs, (2.0, 43.0), strict=True))
    )
    program = ChoiceProgram(tuple("abcde"), np.array([0, 3, 4, 7, 11, 12]), np.zeros(12), budgets)
    assert nearest_limits(program) == {"b0": 64, "b1": 89}


def test_large_costs_do_not_hide_a_nearer_budget():
    costs = [1.0, 0, 0, 1, 2, 0, 1, 0, 0, 0, 0, 2], [52.0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    budgets = tuple(
        Budget(f"b{i}", np.array(c), limit) for i, (c, limit) in enumerate(zip(costs, (1.0, 0.0), strict=True))
    )
    program = ChoiceProgram(tuple("abcd"), np.array([0, 4, 7, 11, 12]), np.zeros(12), budgets)
    assert nearest_limits(program) == {"b0": 2, "b1": 1}


def test_infeasible_solution_names_the_nearest_budget():
    program = network_program()
    least = program.budgets[0].used(program.cheapest(program.budgets[0].cost))
    found = cp_sat(program.with_limits({"bits": least / 2}))
    assert found.status == "infeasible"
    assert found.nearest["bits"] == pytest.approx(least, rel=1e-6)
    with pytest.raises(BudgetError, match=r"nearest budget that can be met: bits .*asked"):
        found.require()
