"""The nearest budgets that can be met, when the ones asked for cannot.

    minimise t  subject to  sum_i cost_c[i, o_i] <= limit_c + t * unit_c

The unit of a budget is its limit (the least it can be, where that is more; its largest cost, where both are 0), so that
all budgets that must be raised are raised by about the same fraction.
"""

from __future__ import annotations

import numpy as np

from dq_plugins.solvers.heuristics import cheapest_start
from dq_plugins.solvers.program import Budget, Choice, ChoiceProgram

STEPS = 10**6
"""Resolution of ``t``: a millionth of the overshoot of the cheapest choice."""


def _unit(program: ChoiceProgram, budget: Budget) -> float:
    return max(abs(budget.limit), budget.used(program.cheapest(budget.cost))) or float(np.abs(budget.cost).max()) or 1.0


def _overshoot(program: ChoiceProgram, choice: Choice, units: list[float]) -> float:
    return max(max(b.used(choice) - b.limit, 0.0) / u for b, u in zip(program.budgets, units, strict=True))


def nearest_limits(program: ChoiceProgram, *, seconds: float = 5.0) -> dict[str, float]:
    """Least limits that can be met, for the budgets that must be raised.

    Args:
        program: an infeasible program.
        seconds: CP-SAT's deterministic time; when it runs out, the limits returned can be met but may not be the least.

    Returns:
        Budget name -> limit.
    """
    from ortools.sat.python import cp_model

    units = [_unit(program, budget) for budget in program.budgets]
    start = cheapest_start(program)
    worst = _overshoot(program, start, units)
    model = cp_model.CpModel()
    chosen = [model.new_bool_var("") for _ in program.error]
    for menu in program.menus():
        model.add_exactly_one(chosen[menu.start : menu.stop])
    raised = model.new_int_var(0, STEPS, "t")
    for budget, unit in zip(program.budgets, units, strict=True):
        scale = STEPS / (unit * max(worst, 1e-9))  # one unit of t is `worst / STEPS` of the budget's unit
        costs = np.rint(budget.cost * scale * 16).astype(np.int64).tolist()
        model.add(cp_model.LinearExpr.weighted_sum(chosen, costs) <= 16 * raised + int(budget.limit * scale * 16))
    model.minimize(raised)
    for column, variable in enumerate(chosen):
        model.add_hint(variable, int(column in set(start.tolist())))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_deterministic_time = seconds
    solver.parameters.relative_gap_limit = 1e-4
    if solver.solve(model) in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        found = np.array([column for column, variable in enumerate(chosen) if solver.value(variable)])
        start = found if _overshoot(program, found, units) < worst else start
    return {b.name: b.used(start) for b in program.budgets if b.used(start) > b.limit}
