"""Solver ``mip``: a mixed-integer solver that OR-Tools ships (SCIP or CBC) on the cores of a choice program."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import numpy as np

from dq_plugins.errors import BudgetError
from dq_plugins.solvers.core import CoreAnswer, solve_by_cores
from dq_plugins.solvers.program import Choice, ChoiceProgram
from dq_plugins.solvers.solution import Solution

Backend = Literal["SCIP", "CBC"]

FEASIBILITY = 1e-6
"""Feasibility tolerance of these solvers, in units of a row whose largest cost is 1."""

ATTEMPTS = 8
"""How often a budget is tightened when a solver's tolerance let a choice slip over it."""


def mip(
    program: ChoiceProgram,
    *,
    hint: Choice | None = None,
    backend: Backend = "SCIP",
    tolerance: float = 0.0,
    seconds: float = 20.0,
    workers: int = 1,
) -> Solution:
    """Exact bit allocation with a mixed-integer solver.

    These solvers work in floating point with tolerances; a choice that slips over a budget is refused and the budget
    tightened by what it slipped, so that no budget is ever exceeded.

    Args:
        program: the program.
        hint: a choice to start from; ignored when it is not feasible.
        backend: ``"SCIP"`` or ``"CBC"``.
        tolerance: relative gap at which a choice counts as optimal.
        seconds: wall time for the last core; a search that it cuts off may end differently on another run.
        workers: threads, where the backend has them.

    Returns:
        The solution; its ``tolerance`` covers the solver's own feasibility tolerance.
    """
    if backend not in ("SCIP", "CBC"):
        raise BudgetError(f"solver 'mip' has the backends SCIP and CBC, got {backend!r}")
    core = partial(_solve_core, backend=backend, workers=workers)
    return solve_by_cores(program, core, name=f"mip ({backend})", hint=hint, tolerance=tolerance, seconds=seconds)


def _solve_core(
    program: ChoiceProgram,
    *,
    hint: Choice | None,
    cutoff: float,
    tolerance: float,
    seconds: float,
    backend: Backend,
    workers: int,
) -> CoreAnswer:
    """Solve one core; see `dq_plugins.solvers.core.CoreSolver`."""
    model = _Model(program, backend)
    model.solver.SetNumThreads(workers)
    if hint is not None:
        model.hint(hint)
    rounding = FEASIBILITY * model.unit * len(program.names)
    bound = -np.inf
    for attempt in range(ATTEMPTS):
        solved, choice, found = model.solve(tolerance, cutoff, seconds)
        if solved == "infeasible":  # first attempt: a proof; later: the tightened budgets leave nothing
            return CoreAnswer(attempt == 0, None, np.inf if attempt == 0 else bound, rounding)
        bound = found if attempt == 0 else bound
        if choice is None:
            return CoreAnswer(False, None, bound, rounding)
        if program.feasible(choice):
            return CoreAnswer(solved == "optimal", choice, bound, rounding)
        model.tighten(choice)
    return CoreAnswer(False, None, bound, rounding)


class _Model:
    """A choice program in the linear-solver wrapper, every row and the objective scaled to largest entry 1."""

    def __init__(self, program: ChoiceProgram, backend: Backend) -> None:
        from ortools.linear_solver import pywraplp

        self.program, self.wrapper = program, pywraplp
        self.solver: Any = pywraplp.Solver.CreateSolver(backend)
        first = program.start[:-1][program.menu_of]  # differences to every menu's first column, as for CP-SAT
        relative = program.error - program.error[first]
        self.offset = program.value(program.start[:-1])
        self.unit = float(np.abs(relative).max()) or 1.0
        costs = [b.cost - b.cost[first] for b in program.budgets]
        self.units = [float(np.abs(c).max()) or 1.0 for c in costs]
        self.rows = [
            self.solver.Constraint(-self.solver.infinity(), (b.limit - b.used(program.start[:-1])) / u)
            for b, u in zip(program.budgets, self.units, strict=True)
        ]
        self.variables: list[Any] = [None] * len(relative)
        for menu in program.menus():
            one = self.solver.Constraint(-self.solver.infinity(), 1.0) if len(menu) > 2 else None
            for column in menu[1:]:
                variable = self.variables[column] = self.solver.BoolVar("")
                self.solver.Objective().SetCoefficient(variable, float(relative[column]) / self.unit)
                if one is not None:
                    one.SetCoefficient(variable, 1.0)
                for row, cost, unit in zip(self.rows, costs, self.units, strict=True):
                    row.SetCoefficient(variable, float(cost[column]) / unit)

    def hint(self, choice: Choice) -> None:
        chosen = set(choice.tolist())
        pairs = [(v, float(c in chosen)) for c, v in enumerate(self.variables) if v is not None]
        self.solver.SetHint([v for v, _ in pairs], [x for _, x in pairs])

    def tighten(self, choice: Choice) -> None:
        """Lower the limits that ``choice`` slipped over by twice what it slipped."""
        for row, budget, unit in zip(self.rows, self.program.budgets, self.units, strict=True):
            over = budget.used(choice) - budget.limit
            if over > 0:
                row.SetUb(row.ub() - max(2 * over / unit, FEASIBILITY / 100))

    def solve(self, tolerance: float, cutoff: float, seconds: float) -> tuple[str, Choice | None, float]:
        """``("optimal" | "infeasible" | "limit", choice or None, lower bound)``."""
        parameters = self.wrapper.MPSolverParameters()
        relative = tolerance / abs(cutoff) if np.isfinite(cutoff) and cutoff else 0.0
        parameters.SetDoubleParam(parameters.RELATIVE_MIP_GAP, relative)
        self.solver.SetTimeLimit(max(int(seconds * 1000), 1))
        status = self.solver.Solve(parameters)
        if status == self.solver.INFEASIBLE:
            return "infeasible", None, np.inf
        if status not in (self.solver.OPTIMAL, self.solver.FEASIBLE):
            return "limit", None, -np.inf
        choice = self.program.start[:-1].copy()
        for column, variable in enumerate(self.variables):
            if variable is not None and variable.solution_value() > 0.5:
                choice[self.program.menu_of[column]] = column
        bound = float(self.solver.Objective().BestBound()) * self.unit + self.offset
        return ("optimal" if status == self.solver.OPTIMAL else "limit"), choice, bound
