"""From what a solver found to a `Solution`: status, bound, what every budget is worth, and the way out if none fits."""

from __future__ import annotations

import math
import time

import numpy as np

from dq_plugins.solvers.integers import BudgetRow, add_choice_sets, chosen_columns, to_integers
from dq_plugins.solvers.linear_program import relaxation
from dq_plugins.solvers.program import Budget, Choice, ChoiceProgram
from dq_plugins.solvers.solution import NO_CHOICE, Solution, Status, Use


def answer(
    program: ChoiceProgram,
    choice: Choice | None,
    solver: str,
    began: float,
    *,
    proven: bool = False,
    bound: float = -np.inf,
    tolerance: float = 0.0,
) -> Solution:
    """What a solver answers.

    Args:
        program: the program.
        choice: a choice within the budgets, or None.
        solver: name of the solver.
        began: when it was called (`time.perf_counter`).
        proven: whether ``choice`` is optimal, or that there is none.
        bound: what the solver knows about the optimum; the linear relaxation bounds it anyway.
        tolerance: see `Solution`.
    """
    status: Status = (
        ("optimal" if proven else "feasible") if choice is not None else "infeasible" if proven else "unknown"
    )
    infeasible = status == "infeasible"
    value = np.inf if choice is None else program.value(choice)
    prices, floor = relaxation(program)
    return Solution(
        status=status,
        choice=NO_CHOICE if choice is None else choice,
        objective=value,
        bound=np.inf if infeasible else min(max(bound, floor), value),
        uses=tuple(
            Use(b.name, 0.0 if choice is None else b.used(choice), b.limit, float(price), b.unit)
            for b, price in zip(program.budgets, prices, strict=True)
        ),
        solver=solver,
        seconds=time.perf_counter() - began,
        tolerance=tolerance,
        nearest=nearest_limits(program) if infeasible else {},
    )


STEPS = 10**4
"""Resolution of ``t``: a ten-thousandth of a budget's unit. With a millionth CP-SAT 9.15 has called a choice optimal
whose t was 2 % above the least: coefficients then span twelve digits."""


def nearest_limits(program: ChoiceProgram, *, seconds: float = 5.0) -> dict[str, float]:
    """Least limits that can be met, for the budgets that must be raised.

        minimise t  subject to  sum_i cost_c[i, o_i] <= limit_c + t * unit_c

    The unit of a budget is its limit (the least it can be, where that is more; its largest cost, where both are 0), so
    that all budgets that must be raised are raised by about the same fraction.

    Args:
        program: an infeasible program.
        seconds: CP-SAT's deterministic time; when it runs out, the limits returned can be met but may not be the least.

    Returns:
        Budget name -> limit.
    """
    from ortools.sat.python import cp_model

    rows, model = to_integers(program).rows, cp_model.CpModel()
    chosen = add_choice_sets(model, program)
    coarse = [_coarser(row) for row in rows]
    steps = [math.ceil(_unit(b, program) * row.scale / STEPS) for b, row in zip(program.budgets, coarse, strict=True)]
    most = [int(np.maximum.reduceat(row.costs, program.start[:-1]).sum()) - row.limit for row in coarse]
    enough = max(math.ceil(above / step) for above, step in zip(most, steps, strict=True))
    raised = model.new_int_var(0, enough, "t")
    for row, step in zip(coarse, steps, strict=True):
        model.add(cp_model.LinearExpr.weighted_sum(chosen, row.costs.tolist()) <= row.limit + step * raised)
    model.minimize(raised)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_deterministic_time = seconds
    solver.parameters.relative_gap_limit = 1e-4
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return {}
    choice = chosen_columns(solver, chosen)
    limits = {}
    for budget, row in zip(program.budgets, rows, strict=True):
        over = int(row.costs[choice].sum()) - row.limit
        if over > 0:  # in integer units, so that the limit can be met after it is rounded again
            limits[budget.name] = (math.floor(budget.limit * row.scale) + over) / row.scale
    return limits


def _coarser(row: BudgetRow) -> BudgetRow:
    """A budget in numbers of at most about 2^30, costs rounded up: times t, larger ones mislead CP-SAT's presolve."""
    shift = max(int(np.abs(row.costs).max()).bit_length() - 30, 0)
    return BudgetRow(-(-row.costs >> shift), row.limit >> shift, row.scale / 2**shift)


def _unit(budget: Budget, program: ChoiceProgram) -> float:
    return max(abs(budget.limit), budget.used(program.cheapest(budget.cost))) or float(np.abs(budget.cost).max()) or 1.0
