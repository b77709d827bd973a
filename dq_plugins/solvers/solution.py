"""What a solver answers: the choice, how good it is, how good it could be at most, and what holds it back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from dq_plugins.errors import BudgetError
from dq_plugins.solvers.program import Choice, ChoiceProgram

Status = Literal["optimal", "feasible", "infeasible", "unknown"]


@dataclass(frozen=True)
class Use:
    """What a solution uses of one budget.

    Attributes:
        name: the budget.
        used: cost of the solution.
        limit: the most it may cost.
        price: by how much the optimum of the relaxed program falls for one more unit of this budget.
        unit: unit of ``used`` and ``limit``.
    """

    name: str
    used: float
    limit: float
    price: float = 0.0
    unit: str = ""

    @property
    def binding(self) -> bool:
        """Whether more of this budget would buy less error."""
        return self.price > 0


@dataclass(frozen=True, eq=False)
class Solution:
    """Answer of a solver.

    Attributes:
        status: ``optimal`` (proven, see ``tolerance``), ``feasible`` (best found; see ``gap``), ``infeasible`` (proven)
            or ``unknown`` (nothing found in the time given).
        choice: chosen column of every choice set, ``[N]``; empty when there is none.
        objective: its error; infinite when there is none.
        bound: no choice within the budgets has a lower error than this.
        uses: what the choice uses of every budget.
        solver: name of the solver.
        seconds: wall time.
        tolerance: by how much ``objective`` may exceed the true optimum although the status is ``optimal``: the gap
            that was asked for plus the rounding of the objective to integers, in units of the objective.
        nearest: when infeasible, the least limits (all raised by the same fraction) that can be met; only those
            budgets that must be raised.
    """

    status: Status
    choice: Choice
    objective: float
    bound: float
    uses: tuple[Use, ...] = ()
    solver: str = ""
    seconds: float = 0.0
    tolerance: float = 0.0
    nearest: dict[str, float] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """Proven relative distance to the optimum, ``(objective - bound) / |objective|``; 0 when they meet."""
        if not np.isfinite(self.objective) or self.objective <= self.bound:
            return 0.0 if np.isfinite(self.objective) else float("inf")
        return (self.objective - self.bound) / (abs(self.objective) or 1.0)

    @property
    def binding(self) -> tuple[str, ...]:
        """Names of the budgets that hold the objective back."""
        return tuple(use.name for use in self.uses if use.binding)

    def require(self) -> Solution:
        """This solution, or `BudgetError` when the budgets cannot be met (or nothing was found)."""
        if self.status == "infeasible":
            asked = {use.name: f"asked: {use.limit:.6g} {use.unit}".rstrip() for use in self.uses}
            nearest = ", ".join(f"{name} {limit:.6g} ({asked[name]})" for name, limit in self.nearest.items())
            raise BudgetError(f"no plan fits the budget. The nearest budget that can be met: {nearest or 'unknown'}.")
        if self.status == "unknown":
            raise BudgetError(
                f"solver {self.solver!r} found no plan in {self.seconds:.1f} s and no proof that there is none; "
                "give it more time or loosen a budget"
            )
        return self


NO_CHOICE: Choice = np.zeros(0, dtype=np.int64)
"""The choice of a solution that has none."""


class Solver(Protocol):
    """A function from a choice program to a solution; its keyword options are its own."""

    def __call__(self, program: ChoiceProgram, *, hint: Choice | None = None, **options: Any) -> Solution:
        """Choose one column of every choice set.

        Args:
            program: the program.
            hint: a choice that may be a good start; may be infeasible, may be ignored.
            options: of the solver.

        Returns:
            A solution whose choice is within every budget, or one without a choice that says why.
        """
        ...
