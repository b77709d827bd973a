"""Choice programs for OR-Tools' linear solvers; from the relaxation, prices of budgets and a bound on the optimum."""

from __future__ import annotations

from typing import Any

import numpy as np

from dq_plugins.solvers.program import Choice, ChoiceProgram, Floats


class LinearModel:
    """A choice program in a solver's hands, the objective and every row scaled to largest entry 1.

    Args:
        program: the program.
        backend: name of the solver; one without integers (GLOP) gets the linear relaxation.

    Attributes:
        solver: OR-Tools' wrapper.
        chosen: a variable for every column, ``[K]``.
        rows: a constraint for every budget, ``[C]``.
        unit: of the objective.
        units: of the rows.
    """

    def __init__(self, program: ChoiceProgram, backend: str) -> None:
        from ortools.linear_solver import pywraplp

        self.solver: Any = pywraplp.Solver.CreateSolver(backend)
        self.unit = _largest(program.error)
        self.units = [_largest(budget.cost) for budget in program.budgets]
        self.chosen = [self.solver.Var(0, 1, self.solver.IsMip(), "") for _ in program.error]
        for choice_set in program.choice_sets():
            one = self.solver.Constraint(1, 1)
            for column in choice_set:
                one.SetCoefficient(self.chosen[column], 1)
        _fill(self.solver.Objective(), self.chosen, program.error / self.unit)
        self.rows = []
        for budget, unit in zip(program.budgets, self.units, strict=True):
            self.rows.append(self.solver.Constraint(-self.solver.infinity(), budget.limit / unit))
            _fill(self.rows[-1], self.chosen, budget.cost / unit)

    def choice(self) -> Choice:
        """The columns of the solver's solution, ``[N]``."""
        return np.array([column for column, variable in enumerate(self.chosen) if variable.solution_value() > 0.5])


def relaxation(program: ChoiceProgram) -> tuple[Floats, float]:
    """Prices of the budgets, ``[C]``, and a lower bound on the optimum.

    A price says how much one more unit of the budget lowers the optimum of the linear relaxation (its dual, by GLOP).
    For any prices ``p >= 0`` no choice has less error than ``sum_i min_o (error[i, o] + p . cost[i, o]) - p . limit``,
    which is evaluated here in float64: the tolerances of the linear solver cannot make it wrong.
    """
    model = LinearModel(program, "GLOP")
    solved = model.solver.Solve() == model.solver.OPTIMAL
    rows = zip(model.rows, model.units, strict=True)
    prices = np.array([max(-row.dual_value() * model.unit / unit, 0.0) if solved else 0.0 for row, unit in rows])
    total = program.error.copy()  # [K]
    for price, budget in zip(prices, program.budgets, strict=True):
        total += price * budget.cost
    spent = sum(float(p) * b.limit for p, b in zip(prices, program.budgets, strict=True))
    return prices, float(total[program.cheapest(total)].sum()) - spent


def _largest(values: Floats) -> float:
    return float(np.abs(values).max()) or 1.0


def _fill(row: Any, variables: list[Any], values: Floats) -> None:
    for variable, value in zip(variables, values.tolist(), strict=True):
        row.SetCoefficient(variable, value)
