"""Choice programs in the integers of CP-SAT: the one place where float errors and costs become int64.

A row of values is multiplied by a power of two, which float64 does exactly, so that its largest becomes about 2^40:

- objective: rounded to nearest. For ``N`` choice sets the optimum found is within ``N / scale`` of the true one (half a
  unit for each choice set in the choice found, and half in the best one): less than ``N * 2^-39`` of the largest error;
- budget: costs are rounded up and the limit down, so it is never exceeded, and no more than ``(N + 1) / scale`` of it
  is given away. Integer costs (bits, bytes, BitOps) are never scaled down and lose nothing. Then costs are written as
  differences to the first column of their choice set, which halves CP-SAT's time.

Shapes: ``N`` choice sets, ``K`` columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dq_plugins.solvers.program import Budget, Choice, ChoiceProgram, Floats, Integers

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

EXPONENT = 40


class BudgetRow(NamedTuple):
    """A budget in integers.

    Attributes:
        costs: ``[K]``, above those of the first column of each choice set.
        limit: the same for the limit, above the cost of all first columns.
        scale: integer units for one unit of the budget.
    """

    costs: Integers
    limit: int
    scale: float


@dataclass(frozen=True, eq=False)
class IntegerProgram:
    """A choice program in integers.

    Attributes:
        error: ``[K]``.
        scale: integer units for one unit of the objective.
        rows: the budgets.
        rounding: the most by which the integer objective misplaces the optimum, in units of the objective.
    """

    error: Integers
    scale: float
    rows: tuple[BudgetRow, ...]
    rounding: float


def power_of_two(values: Floats, exponent: int = EXPONENT) -> float:
    """The power of two that brings the largest of ``values`` to between half of ``2**exponent`` and that."""
    return 2.0 ** (exponent - math.frexp(float(np.abs(values).max()))[1])


def to_integers(program: ChoiceProgram) -> IntegerProgram:
    """Scale and round a choice program."""
    scale = power_of_two(program.error)
    error = np.rint(program.error * scale).astype(np.int64)
    rows = tuple(_row(budget, program) for budget in program.budgets)
    return IntegerProgram(error, scale, rows, len(program.names) / scale)


def _row(budget: Budget, program: ChoiceProgram) -> BudgetRow:
    scale = max(power_of_two(budget.cost), 1.0 if budget.integral else 0.0)
    costs = np.ceil(budget.cost * scale).astype(np.int64)
    first = costs[program.start[:-1]]  # [N]
    limit = min(budget.limit, 2 * float(np.abs(budget.cost).sum()))  # beyond what can be spent, and within int64
    return BudgetRow(costs - first[program.set_of], math.floor(limit * scale) - int(first.sum()), scale)


def add_choice_sets(model: cp_model.CpModel, program: ChoiceProgram) -> list[Any]:
    """One Boolean variable for every column, ``[K]``; exactly one of every choice set is true."""
    chosen = [model.new_bool_var("") for _ in program.error]
    for choice_set in program.choice_sets():
        model.add_exactly_one(chosen[choice_set.start : choice_set.stop])
    return chosen


def chosen_columns(solver: cp_model.CpSolver, chosen: list[Any]) -> Choice:
    """The columns whose variables are true, ``[N]``."""
    return np.array([column for column, variable in enumerate(chosen) if solver.boolean_value(variable)])
