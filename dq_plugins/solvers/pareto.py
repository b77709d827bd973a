"""Error against budget: the same program at many limits, each solution the warm start of the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from dq_plugins.solvers.program import ChoiceProgram
from dq_plugins.solvers.protocol import Solver
from dq_plugins.solvers.solution import Solution


def pareto(
    program: ChoiceProgram, solver: Solver, limits: Sequence[dict[str, float]], **options: Any
) -> Iterator[tuple[dict[str, float], Solution]]:
    """Solve ``program`` at each of ``limits``, best from loose to tight or from tight to loose.

    A solution of the limits before is the start of the search where it is still feasible (from tight to loose it
    always is). Where it was optimal under looser limits and still fits, it is optimal again and nothing is solved.

    Args:
        program: the program.
        solver: any solver.
        limits: budget name -> limit, for every point; budgets not named keep the program's limit.
        options: options of the solver.

    Yields:
        ``(limits, solution)`` in the given order.
    """
    before: tuple[dict[str, float], Solution] | None = None
    for point in limits:
        current = program.with_limits(point)
        solution = _still_optimal(current, before) or solver(
            current, hint=before[1].choice if before and before[1].choice.size else None, **options
        )
        full = {b.name: b.limit for b in current.budgets}
        before = (full, solution) if solution.choice.size else before
        yield point, solution


def _still_optimal(program: ChoiceProgram, before: tuple[dict[str, float], Solution] | None) -> Solution | None:
    if before is None or before[1].status != "optimal":
        return None
    tighter = all(b.limit <= before[0][b.name] for b in program.budgets)
    if not tighter or not program.feasible(before[1].choice):
        return None
    uses = tuple(replace(u, limit=b.limit) for u, b in zip(before[1].uses, program.budgets, strict=True))
    return replace(before[1], uses=uses, seconds=0.0)
