"""Solver ``mip``: SCIP, through OR-Tools.

Of the mixed-integer solvers that OR-Tools ships, it is the one that closes the gap it is asked to close: HiGHS and CBC
call plans optimal that are up to 0.02 % and 0.3 % above the optimum (`benchmarks.solvers`).
"""

from __future__ import annotations

import time

import numpy as np

from dq_plugins.solvers.answer import answer
from dq_plugins.solvers.linear_program import LinearModel
from dq_plugins.solvers.program import Choice, ChoiceProgram
from dq_plugins.solvers.quick import start_of
from dq_plugins.solvers.solution import Solution

FEASIBILITY = 1e-6
"""Feasibility tolerance of the solver, in units of a row (or an objective) whose largest entry is 1."""


def mip(
    program: ChoiceProgram, *, hint: Choice | None = None, tolerance: float = 0.0, seconds: float = 20.0
) -> Solution:
    """Bit allocation with SCIP.

    SCIP works in floating point with tolerances. Its choice is checked against the budgets exactly; if it slipped over
    one, the search is repeated with all limits lower by twice the tolerance. The bound stays that of the first search,
    so the choice counts as optimal only if it meets that.

    Args:
        program: the program.
        hint: a choice to start from; where it is not feasible, the search starts from the greedy one.
        tolerance: relative gap at which a choice counts as optimal.
        seconds: wall time of a search; one that it cuts off may end differently on another run.

    Returns:
        The solution; its ``tolerance`` covers the solver's own feasibility tolerance.
    """
    from ortools.linear_solver import pywraplp

    began, model = time.perf_counter(), LinearModel(program, "SCIP")
    parameters = pywraplp.MPSolverParameters()
    parameters.SetDoubleParam(parameters.RELATIVE_MIP_GAP, tolerance)
    model.solver.SetTimeLimit(max(int(seconds * 1000), 1))
    best, bound, infeasible = start_of(program, hint), -np.inf, False
    if best is not None:
        model.solver.SetHint(model.chosen, list(map(float, program.taken(best))))
    for attempt in range(2):
        status = model.solver.Solve(parameters)
        found = status in (model.solver.OPTIMAL, model.solver.FEASIBLE)
        if attempt == 0:
            infeasible = status == model.solver.INFEASIBLE
            bound = model.solver.Objective().BestBound() * model.unit if found else bound
        if not found:
            break
        choice = model.choice()
        if program.feasible(choice):
            best = choice if best is None else min(best, choice, key=program.value)
            break
        for row in model.rows:
            row.SetUb(row.ub() - 2 * FEASIBILITY)
    if best is None:
        return answer(program, None, "mip", began, proven=infeasible)
    value = program.value(best)
    rounding = FEASIBILITY * (model.unit + abs(value))
    slack = rounding + tolerance * abs(value)
    proven = value - bound <= slack
    return answer(program, best, "mip", began, proven=proven, bound=bound - rounding, tolerance=slack)
