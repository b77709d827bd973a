"""Solver ``cp-sat``: OR-Tools CP-SAT; the default."""

from __future__ import annotations

import time

import numpy as np

from dq_plugins.solvers.answer import answer
from dq_plugins.solvers.integers import add_choice_sets, chosen_columns, to_integers
from dq_plugins.solvers.program import Choice, ChoiceProgram
from dq_plugins.solvers.quick import start_of
from dq_plugins.solvers.solution import Solution


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
        hint: a choice to start from; where it is not feasible, the search starts from the greedy one.
        tolerance: relative gap at which a choice counts as optimal; 0 for an exact proof.
        seconds: CP-SAT's deterministic time: about a second each on an idle core, and the same search on a busy one.
        workers: threads. One makes the answer reproducible bit for bit; with more, ties and interrupted searches
            may end differently.

    Returns:
        The solution; see `dq_plugins.solvers.integers` for its ``tolerance``.
    """
    from ortools.sat.python import cp_model

    began, integers, model = time.perf_counter(), to_integers(program), cp_model.CpModel()
    chosen = add_choice_sets(model, program)
    for costs, limit, _ in integers.rows:
        model.add(cp_model.LinearExpr.weighted_sum(chosen, costs.tolist()) <= limit)
    model.minimize(cp_model.LinearExpr.weighted_sum(chosen, integers.error.tolist()))
    best = start_of(program, hint)
    if best is not None:
        for variable, taken in zip(chosen, program.taken(best), strict=True):
            model.add_hint(variable, taken)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = workers
    solver.parameters.max_deterministic_time = seconds
    solver.parameters.relative_gap_limit = tolerance
    status = solver.solve(model)
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        found = chosen_columns(solver, chosen)
        best = found if best is None else min(best, found, key=program.value)
    # when rounding a limit down leaves nothing, the start may still be within the limit itself
    infeasible = status == cp_model.INFEASIBLE
    return answer(
        program,
        best,
        "cp-sat",
        began,
        proven=infeasible if best is None else status == cp_model.OPTIMAL,
        bound=-np.inf if infeasible else solver.best_objective_bound / integers.scale - integers.rounding,
        tolerance=integers.rounding + (tolerance * abs(program.value(best)) if best is not None else 0.0),
    )
