from __future__ import annotations

import pytest
from choice_programs import network_program

from dq_plugins.solvers import ChoiceProgram, Solution, pareto
from dq_plugins.solvers.cp_sat import cp_sat


class Counting:
    def __init__(self) -> None:
        self.hints: list[bool] = []

    def __call__(self, program: ChoiceProgram, *, hint=None, **options) -> Solution:
        self.hints.append(hint is not None and program.feasible(hint))
        return cp_sat(program, hint=hint, **options)


def bits(program: ChoiceProgram, factor: float) -> dict[str, float]:
    return {"bits": program.budgets[0].limit * factor}


def test_front_falls_with_the_budget_and_each_point_is_optimal():
    program = network_program(30)
    points = list(pareto(program, cp_sat, [bits(program, f) for f in (0.8, 0.9, 1.0, 1.1)]))
    errors = [solution.objective for _, solution in points]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1]
    assert all(s.objective == cp_sat(program.with_limits(limits)).objective for limits, s in points)


def test_from_tight_to_loose_every_search_starts_from_the_point_before():
    program, solver = network_program(30), Counting()
    list(pareto(program, solver, [bits(program, f) for f in (0.8, 0.9, 1.0)]))
    assert solver.hints == [False, True, True]


def test_optimum_that_still_fits_is_not_searched_for_again():
    program, solver = network_program(30), Counting()
    first = cp_sat(program)
    used = first.uses[0].used
    points = list(pareto(program, solver, [{}, {"bits": used}]))
    assert len(solver.hints) == 1
    assert points[1][1].objective == first.objective
    assert points[1][1].uses[0].limit == used


def test_point_that_cannot_be_met_does_not_end_the_sweep():
    program = network_program(30)
    statuses = [s.status for _, s in pareto(program, cp_sat, [{"bits": 1.0}, {}])]
    assert statuses == ["infeasible", "optimal"]


def test_options_reach_the_solver():
    program = network_program(30)
    with pytest.raises(TypeError):
        list(pareto(program, cp_sat, [{}], nonsense=1))
