"""Solver ``cp-sat``: OR-Tools CP-SAT on the cores of a choice program; the default."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dq_plugins.solvers.core import CoreAnswer, solve_by_cores
from dq_plugins.solvers.integers import IntegerProgram, to_integers
from dq_plugins.solvers.program import Choice, ChoiceProgram
from dq_plugins.solvers.solution import Solution

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

STRATEGIES = ("reduced_costs", "default_lp", "pseudo_costs", "max_lp", "quick_restart")
"""CP-SAT strategies that close these cores, best first; measured in benchmarks/solvers.py."""


def _model(program: ChoiceProgram, integers: IntegerProgram) -> tuple[cp_model.CpModel, list[Any], np.ndarray]:
    """The model, its variables, and the column each one stands for. First columns have no variable of their own."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    variables, columns = [], []
    for menu in program.menus():
        mine = [model.new_bool_var("") for _ in menu[1:]]
        if len(mine) > 1:
            model.add_at_most_one(mine)
        variables += mine
        columns += menu[1:]
    index = np.array(columns, dtype=np.int64)
    for costs, limit in integers.rows:
        model.add(cp_model.LinearExpr.weighted_sum(variables, costs[index].tolist()) <= limit)
    model.minimize(cp_model.LinearExpr.weighted_sum(variables, integers.error[index].tolist()))
    return model, variables, index


def cp_sat(
    program: ChoiceProgram,
    *,
    hint: Choice | None = None,
    tolerance: float = 0.0,
    seconds: float = 20.0,
    workers: int = 1,
) -> Solution:
    """Exact bit allocation with OR-Tools CP-SAT.

    Args:
        program: the program.
        hint: a choice to start from; ignored when it is not feasible.
        tolerance: relative gap at which a choice counts as optimal; 0 for an exact proof.
        seconds: CP-SAT's deterministic time for the last core: about a second each on an idle core, and the same
            search on a busy one.
        workers: threads. One makes the answer reproducible bit for bit; with more, ties and interrupted searches
            may end differently.

    Returns:
        The solution; see `dq_plugins.solvers.integers` for its ``tolerance``.
    """
    core = partial(_solve_core, workers=workers)
    return solve_by_cores(program, core, name="cp-sat", hint=hint, tolerance=tolerance, seconds=seconds)


def _solve_core(
    program: ChoiceProgram, *, hint: Choice | None, cutoff: float, tolerance: float, seconds: float, workers: int
) -> CoreAnswer:
    """Solve one core; see `dq_plugins.solvers.core.CoreSolver`. Below a cutoff no hint is of use."""
    from ortools.sat.python import cp_model

    integers = to_integers(program)
    if len(program.error) == len(program.names):  # nothing to choose
        only = program.start[:-1]
        found = only if program.feasible(only) and program.value(only) < cutoff else None
        return CoreAnswer(True, found, np.inf if found is None else program.value(found), integers.rounding)
    model, variables, columns = _model(program, integers)
    if np.isfinite(cutoff):
        objective = cp_model.LinearExpr.weighted_sum(variables, integers.error[columns].tolist())
        model.add(objective <= integers.above(cutoff) - 1)
    solver = cp_model.CpSolver()
    parameters = solver.parameters
    parameters.num_workers = workers
    parameters.subsolvers.extend(STRATEGIES[:workers])
    parameters.max_deterministic_time = seconds
    parameters.absolute_gap_limit = max(tolerance * integers.scale, 0.0)
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return CoreAnswer(True, None, np.inf, integers.rounding)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return CoreAnswer(False, None, -np.inf, integers.rounding)
    choice = program.start[:-1].copy()
    for variable, column in zip(variables, columns, strict=True):
        if solver.value(variable):
            choice[program.menu_of[column]] = column
    bound = solver.best_objective_bound / integers.scale + integers.offset
    return CoreAnswer(status == cp_model.OPTIMAL, choice, bound, integers.rounding)
