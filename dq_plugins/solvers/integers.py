"""Choice programs in integers, for CP-SAT.

Errors are floats, CP-SAT counts in int64. Every menu's first column is taken as given and the others are written as
differences to it, which keeps the numbers small:

- objective: scaled so that the largest difference becomes 2^40 and rounded to nearest. For ``N`` menus the optimum
  found is within ``N / scale`` of the true one (half a unit for each menu, in the choice found and in the best one);
- a budget of integers (bits, bit operations, bytes) is divided by the greatest common divisor: no rounding at all;
- a budget of floats (milliseconds) is scaled in the same way, costs rounded up and the limit down: never exceeded, and
  no more than ``(N + 1) / scale`` of it is given away.

Shapes: ``N`` menus, ``K`` columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dq_plugins.solvers.program import Budget, ChoiceProgram, Floats

RESOLUTION = 2**40


@dataclass(frozen=True, eq=False)
class IntegerProgram:
    """A choice program in integers, relative to the first column of every menu.

    Attributes:
        error: ``[K]`` int64, zero at the first column of every menu.
        scale: integer units for one unit of the objective.
        offset: objective of the choice of all first columns.
        rows: ``([K] int64 costs, limit)`` of every budget that can be exceeded.
        rounding: the most by which the integer objective misplaces the optimum, in units of the objective.
    """

    error: NDArray[np.int64]
    scale: float
    offset: float
    rows: tuple[tuple[NDArray[np.int64], int], ...]
    rounding: float

    def above(self, value: float) -> int:
        """The least integer objective that is not better than ``value``."""
        return math.ceil((value - self.offset) * self.scale)


def _largest(values: Floats) -> float:
    return float(np.abs(values).max()) or 1.0


def _relative(program: ChoiceProgram, values: Floats) -> tuple[Floats, float]:
    first = program.start[:-1]
    return values - values[first][program.menu_of], math.fsum(values[first])


def _row(program: ChoiceProgram, budget: Budget) -> tuple[NDArray[np.int64], int]:
    relative, base = _relative(program, budget.cost)
    if budget.integral:
        costs = relative.astype(np.int64)
        divisor = max(int(np.gcd.reduce(np.abs(costs))), 1)
        return costs // divisor, math.floor((math.floor(budget.limit) - round(base)) / divisor)
    largest = _largest(relative)
    scale = RESOLUTION / largest
    # the factor covers the rounding of the float64 products, sums and differences
    margin = 2**-50 * (abs(base) + abs(budget.limit) + largest * len(program.names))
    return np.ceil(relative * scale).astype(np.int64), math.floor((budget.limit - base - margin) * scale)


def to_integers(program: ChoiceProgram) -> IntegerProgram:
    """Scale and round a choice program."""
    relative, offset = _relative(program, program.error)
    largest = _largest(relative)
    scale = RESOLUTION / largest
    rows = (_row(program, budget) for budget in program.budgets)
    binding = tuple((costs, limit) for costs, limit in rows if _most(program, costs) > limit)
    rounding = len(program.names) / scale
    return IntegerProgram(np.rint(relative * scale).astype(np.int64), scale, offset, binding, rounding)


def _most(program: ChoiceProgram, costs: NDArray[np.int64]) -> int:
    return int(np.maximum.reduceat(costs, program.start[:-1]).sum())
