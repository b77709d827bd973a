"""Solvers ``greedy``, ``threshold`` and ``exhaustive``: two baselines without proof, and brute force for tests."""

from __future__ import annotations

import itertools
import time

import numpy as np

from dq_plugins.errors import BudgetError
from dq_plugins.solvers.heuristics import cheapest_start, improve, threshold_choice
from dq_plugins.solvers.nearest import nearest_limits
from dq_plugins.solvers.program import Choice, ChoiceProgram
from dq_plugins.solvers.solution import NO_CHOICE, Solution, Status, uses_of

EXHAUSTIVE_LIMIT = 2_000_000
"""Most combinations that ``exhaustive`` tries."""


def _solution(
    program: ChoiceProgram, choice: Choice | None, name: str, began: float, *, proven: bool = False
) -> Solution:
    found = choice is not None
    status: Status = "optimal" if proven and found else "feasible" if found else "infeasible" if proven else "unknown"
    value = program.value(choice) if choice is not None else np.inf
    floor = float(program.error[program.cheapest(program.error)].sum())
    return Solution(
        status=status,
        choice=choice if choice is not None else NO_CHOICE,
        objective=value,
        bound=value if proven else floor,
        uses=uses_of(program, choice if choice is not None else NO_CHOICE),
        solver=name,
        seconds=time.perf_counter() - began,
        nearest=nearest_limits(program) if status == "infeasible" else {},
    )


def greedy(program: ChoiceProgram, *, hint: Choice | None = None) -> Solution:
    """Start at the cheapest widths and always buy the change that saves the most error per budget used.

    Args:
        program: the program.
        hint: not used.

    Returns:
        A solution without proof: its bound is that of a program without budgets.
    """
    began = time.perf_counter()
    start = cheapest_start(program)
    return _solution(program, improve(program, start) if program.feasible(start) else None, "greedy", began)


def threshold(program: ChoiceProgram, *, hint: Choice | None = None) -> Solution:
    """One error threshold for all layers, as low as the budgets allow (Apple's mixed-bit rule).

    Args:
        program: the program.
        hint: not used.

    Returns:
        A solution without proof: its bound is that of a program without budgets.
    """
    began = time.perf_counter()
    return _solution(program, threshold_choice(program), "threshold", began)


def exhaustive(program: ChoiceProgram, *, hint: Choice | None = None) -> Solution:
    """Every combination, for tests and tiny models.

    Args:
        program: the program.
        hint: not used.

    Raises:
        BudgetError: there are more than `EXHAUSTIVE_LIMIT` combinations.
    """
    began = time.perf_counter()
    combinations = float(np.prod(np.diff(program.start).astype(np.float64)))
    if combinations > EXHAUSTIVE_LIMIT:
        raise BudgetError(
            f"solver 'exhaustive' would try {combinations:.2g} combinations of {len(program.names)} menus; it takes "
            f"{EXHAUSTIVE_LIMIT} at most. Use 'cp-sat'."
        )
    candidates = (np.array(columns) for columns in itertools.product(*program.menus()))
    best = min(filter(program.feasible, candidates), key=program.value, default=None)
    return _solution(program, best, "exhaustive", began, proven=True)
