"""Bounds that shrink a choice program exactly: linear relaxation, Lagrangian bound, reduced costs.

For any prices ``p >= 0`` the Lagrangian bound

    L(p) = sum_i min_o (error[i, o] + p . cost[i, o]) - p . limit

is no more than the optimum, and a column whose reduced cost ``r[i, o]`` (its distance to the minimum of its menu)
exceeds ``incumbent - L(p)`` is in no better solution. The prices come from the linear relaxation (GLOP); the bound is
then evaluated from the formula in float64, so that the tolerances of the linear solver cannot make it wrong.

Source: reduced-cost fixing for multiple-choice knapsacks; Pisinger, "A minimal algorithm for the multiple-choice
knapsack problem", EJOR 83 (1995).

Shapes: ``N`` menus, ``K`` columns, ``C`` budgets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dq_plugins.solvers.program import ChoiceProgram, Floats


@dataclass(frozen=True, eq=False)
class Relaxation:
    """A bound on the optimum and what it implies.

    Attributes:
        bound: no choice within the budgets has a lower error.
        prices: shadow price of every budget, ``[C]``, in error per unit of cost.
        reduced: reduced cost of every column, ``[K]``, zero in at least one column of every menu.
        feasible: False when even the relaxed program has no solution.
    """

    bound: float
    prices: Floats
    reduced: Floats
    feasible: bool = True


def undominated(program: ChoiceProgram) -> NDArray[np.bool_]:
    """Columns, ``[K]``, not beaten by another one of their menu in error and in every cost.

    Among equal columns the first is kept, so some optimal solution survives.
    """
    keep = np.ones(len(program.error), dtype=bool)
    table = np.stack([program.error, *(b.cost for b in program.budgets)])
    for menu in program.menus():
        values = table[:, menu.start : menu.stop]
        no_worse = (values[:, :, None] <= values[:, None, :]).all(0)  # [j, k]: j is no worse than k
        better = no_worse & ~(no_worse.T & (np.arange(len(menu))[:, None] >= np.arange(len(menu))[None, :]))
        keep[menu.start : menu.stop] = ~better.any(0)
    return keep


def lagrangian(program: ChoiceProgram, prices: Floats) -> Relaxation:
    """Bound and reduced costs at given prices."""
    total = program.error.copy()
    for price, budget in zip(prices, program.budgets, strict=True):
        total += price * budget.cost
    least = total[program.cheapest(total)]
    bound = float(least.sum()) - sum(p * b.limit for p, b in zip(prices, program.budgets, strict=True))
    return Relaxation(bound, prices, total - least[program.menu_of])


def relax(program: ChoiceProgram) -> Relaxation:
    """Solve the linear relaxation with GLOP and return the Lagrangian bound at its prices."""
    from ortools.linear_solver import pywraplp

    if not program.budgets:
        return lagrangian(program, np.zeros(0))
    error_unit = float(np.abs(program.error).max()) or 1.0
    units = [float(np.abs(b.cost).max()) or 1.0 for b in program.budgets]
    solver = pywraplp.Solver.CreateSolver("GLOP")
    infinity, objective = solver.infinity(), solver.Objective()
    rows = [solver.Constraint(-infinity, b.limit / u) for b, u in zip(program.budgets, units, strict=True)]
    for menu in program.menus():
        one = solver.Constraint(1.0, 1.0)
        for column in menu:
            variable = solver.NumVar(0.0, infinity, "")
            one.SetCoefficient(variable, 1.0)
            objective.SetCoefficient(variable, float(program.error[column]) / error_unit)
            for row, budget, unit in zip(rows, program.budgets, units, strict=True):
                row.SetCoefficient(variable, float(budget.cost[column]) / unit)
    status = solver.Solve()
    solved = status == pywraplp.Solver.OPTIMAL
    duals = [max(0.0, -row.dual_value()) if solved else 0.0 for row in rows]
    prices = np.array(duals) * error_unit / np.array(units)
    relaxed = lagrangian(program, prices)
    return Relaxation(relaxed.bound, prices, relaxed.reduced, status != pywraplp.Solver.INFEASIBLE)
