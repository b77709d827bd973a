"""Solve a bit allocation problem with a registered solver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dq_plugins import registry
from dq_plugins.passes.allocation.columns import choice_of, widths_of
from dq_plugins.passes.allocation.problem import AllocationProblem
from dq_plugins.quantized.candidates import Entry
from dq_plugins.quantized.width import Width, entries_of
from dq_plugins.solvers.solution import Solution


@dataclass(frozen=True)
class Allocation:
    """A solved problem.

    Attributes:
        problem: the problem.
        widths: the widths of every layer; empty when there is no solution.
        solution: what the solver says, in columns of ``problem.program()``.
    """

    problem: AllocationProblem
    widths: Mapping[str, Width]
    solution: Solution

    def entries(self) -> list[Entry]:
        """The quantized operands of all layers."""
        return entries_of(self.widths)

    @property
    def error(self) -> float:
        """Predicted error: the sum over all entries."""
        return self.solution.objective


def allocate(
    problem: AllocationProblem, solver: str = "cp-sat", *, hint: Mapping[str, Width] | None = None, **options: Any
) -> Allocation:
    """Solve a bit allocation problem.

    Args:
        problem: the problem.
        solver: a registered solver.
        hint: widths that may be a good start.
        options: options of the solver.

    Returns:
        The allocation; its solution says whether it is proven optimal, or why there is none.
    """
    program, columns = problem.program()
    start = None if not hint else choice_of(program, columns, hint)
    solution: Solution = registry.get("solver", solver)(program, hint=start, **options)
    return Allocation(problem, widths_of(columns, solution.choice), solution)
