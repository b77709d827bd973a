"""What a solver answers: the choice, how good it is, how good it could be at most, and what holds it back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

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
        choice: chosen column of every menu, ``[N]``; empty when there is none.
        objective: its error; infinite when there is none.
        bound: no choice within the budgets has a lower error than this.
        uses: what the choice uses of every budget.
        solver: name of the solver.
        seconds: wall time.
        tolerance: by how much ``objective`` may exceed the true optimum although the status is ``optimal``: the gap
            that was asked for plus the rounding of the objective to integers, in units of the objective.
        nearest: when infeasible, the least limits (all raised by the same fraction) that can be met; only those
            budgets that must be raised.
        menus: how many menus and columns were left for the search after the exact reductions.
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
    menus: tuple[int, int] = (0, 0)

    @property
    def gap(self) -> float:
        """Proven relative distance to the optimum, ``(objective - bound) / |objective|``; 0 when they meet."""
        if not np.isfinite(self.objective) or self.objective <= self.bound:
            return 0.0 if np.isfinite(self.objective) else float("inf")
        return (self.objective - self.bound) / abs(self.objective)

    @property
    def binding(self) -> tuple[str, ...]:
        """Names of the budgets that hold the objective back."""
        return tuple(use.name for use in self.uses if use.binding)

    def require(self) -> Solution:
        """This solution, or `BudgetError` when the budgets cannot be met (or nothing was found)."""
        if self.status == "infeasible":
            raise BudgetError(f"no plan fits the budget. {self.nearest_text()}")
        if self.status == "unknown":
            raise BudgetError(
                f"solver {self.solver!r} found no plan in {self.seconds:.1f} s and no proof that there is none; "
                "give it more time or loosen a budget"
            )
        return self

    def nearest_text(self) -> str:
        """One sentence on the nearest feasible budgets."""
        limits = {use.name: use for use in self.uses}
        parts = [
            f"{n} {v:.6g} (asked: {limits[n].limit:.6g} {limits[n].unit}".rstrip() + ")"
            for n, v in self.nearest.items()
        ]
        return "The nearest budget that can be met: " + (", ".join(parts) if parts else "unknown") + "."

    def __str__(self) -> str:
        """One line for logs."""
        if self.choice.size == 0:
            return f"{self.status} ({self.solver}, {self.seconds:.2f} s) " + (
                self.nearest_text() if self.nearest else ""
            )
        held = ", ".join(self.binding) or "no budget"
        return (
            f"{self.status}: {self.objective:.6g}, bound {self.bound:.6g}, gap {self.gap:.1e}, held by {held} "
            f"({self.solver}, {self.seconds:.2f} s)"
        )


def uses_of(program: ChoiceProgram, choice: Choice, prices: np.ndarray | None = None) -> tuple[Use, ...]:
    """What ``choice`` (may be empty) uses of every budget, with shadow prices ``[C]`` if they are known."""
    prices = np.zeros(len(program.budgets)) if prices is None else prices
    return tuple(
        Use(b.name, b.used(choice) if choice.size else 0.0, b.limit, float(p), b.unit)
        for b, p in zip(program.budgets, prices, strict=True)
    )


NO_CHOICE: Choice = np.zeros(0, dtype=np.int64)
"""The choice of a solution that has none."""
