"""Choice programs: take one option from every choice set, least total error, several budgets.

    minimise    sum_i  error[i, o_i]
    subject to  sum_i  cost_c[i, o_i] <= limit_c        for every budget c

This is the multiple-choice, multi-dimensional knapsack. Choice sets have different lengths, so options are stored as
columns, choice set after choice set.

Shapes: ``N`` choice sets, ``K`` columns (options of all choice sets together), ``C`` budgets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dq_plugins.errors import BudgetError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Choice = NDArray[np.int64]
"""One chosen column for every choice set, ``[N]``."""


@dataclass(frozen=True, eq=False)
class Budget:
    """A linear budget over all choice sets.

    Attributes:
        name: how messages and results call it.
        cost: what every column costs, ``[K]``, in ``unit``.
        limit: the most that the chosen columns may cost together.
        unit: unit of ``cost`` and ``limit``, for messages.
    """

    name: str
    cost: Floats
    limit: float
    unit: str = ""

    @cached_property
    def integral(self) -> bool:
        """Whether every cost is an integer that float64 holds exactly; then budgets are met to the last unit."""
        return bool((self.cost == np.rint(self.cost)).all()) and float(np.abs(self.cost).sum()) < 2**53

    def used(self, choice: Choice) -> float:
        """Cost of a choice, summed without rounding error."""
        return math.fsum(self.cost[choice])


@dataclass(frozen=True, eq=False)
class ChoiceProgram:
    """A multiple-choice program; see the module's formula.

    Attributes:
        names: one name for every choice set.
        start: ``[N + 1]``; the columns of choice set ``i`` are ``start[i] .. start[i + 1] - 1``.
        error: what every column adds to the objective, ``[K]``; lower is better.
        budgets: the budgets, all of which hold at once.

    Example:
        >>> program = ChoiceProgram.of(
        ...     {"a": [9.0, 1.0], "b": [4.0, 0.5]}, {"bits": ({"a": [2, 4], "b": [2, 4]}, 6.0)}
        ... )
        >>> program.value(np.array([1, 2])), program.feasible(np.array([1, 2]))
        (5.0, True)
    """

    names: tuple[str, ...]
    start: Integers
    error: Floats
    budgets: tuple[Budget, ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            raise BudgetError("a choice program needs at least one choice set, got none")
        empty = [n for n, size in zip(self.names, np.diff(self.start), strict=True) if size < 1]
        if empty:
            raise BudgetError(
                f"the choice set of {empty[0]!r} is empty: every layer needs at least one width to choose"
            )
        columns = int(self.start[-1])
        for what, values in [("error", self.error), *((b.name, b.cost) for b in self.budgets)]:
            if values.shape != (columns,):
                raise BudgetError(f"{what!r} has {values.size} values for {columns} options")
            bad = np.flatnonzero(~np.isfinite(values))
            if bad.size:
                raise BudgetError(f"{what!r} of {self.names[self.set_of[bad[0]]]!r} is {values[bad[0]]}, not a number")
        for budget in self.budgets:
            if not math.isfinite(budget.limit):
                raise BudgetError(
                    f"the limit of budget {budget.name!r} is {budget.limit}; leave the budget out instead"
                )

    @classmethod
    def of(
        cls,
        errors: Mapping[str, Sequence[float]],
        budgets: Mapping[str, tuple[Mapping[str, Sequence[float]], float]] | None = None,
    ) -> ChoiceProgram:
        """Build a program from dicts.

        Args:
            errors: choice set name -> error of each of its options.
            budgets: budget name -> (choice set name -> cost of each option, limit).
        """
        start = np.cumsum([0, *map(len, errors.values())])
        return cls(
            tuple(errors),
            start,
            np.array([e for row in errors.values() for e in row], dtype=np.float64),
            tuple(
                Budget(
                    name,
                    np.array([c for choice_set in errors for c in cost[choice_set]], dtype=np.float64),
                    float(limit),
                )
                for name, (cost, limit) in (budgets or {}).items()
            ),
        )

    @cached_property
    def set_of(self) -> Integers:
        """Choice set of every column, ``[K]``."""
        return np.repeat(np.arange(len(self.names)), np.diff(self.start))

    def choice_sets(self) -> Iterator[range]:
        """Columns of every choice set, in order."""
        for low, high in zip(self.start[:-1], self.start[1:], strict=True):
            yield range(int(low), int(high))

    def cheapest(self, value: Floats, ties: Floats | None = None) -> Choice:
        """In every choice set the column of least ``value``, then of least ``ties`` (both ``[K]``), then the first."""
        order = np.lexsort((value, self.set_of) if ties is None else (ties, value, self.set_of))
        return order[self.start[:-1]]

    def value(self, choice: Choice) -> float:
        """Objective of a choice."""
        return math.fsum(self.error[choice])

    def taken(self, choice: Choice) -> list[bool]:
        """Whether a choice takes each of the ``K`` columns."""
        return np.isin(np.arange(len(self.error)), choice).tolist()

    def feasible(self, choice: Choice) -> bool:
        """Whether a choice is within every limit."""
        return all(b.used(choice) <= b.limit for b in self.budgets)

    def with_limits(self, limits: Mapping[str, float]) -> ChoiceProgram:
        """The same program with other limits, by budget name."""
        unknown = sorted(set(limits) - {b.name for b in self.budgets})
        if unknown:
            raise BudgetError(
                f"there is no budget {unknown[0]!r}; there are: {', '.join(b.name for b in self.budgets)}"
            )
        budgets = tuple(Budget(b.name, b.cost, float(limits.get(b.name, b.limit)), b.unit) for b in self.budgets)
        return ChoiceProgram(self.names, self.start, self.error, budgets)
