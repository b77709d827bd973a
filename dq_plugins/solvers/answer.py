"""From what a solver found to a `Solution`: status, bound, what every budget is worth, and the way out if none fits."""

from __future__ import annotations

import time

import numpy as np

from dq_plugins.solvers.linear_program import relaxation
from dq_plugins.solvers.nearest import nearest_limits
from dq_plugins.solvers.program import Choice, ChoiceProgram
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
