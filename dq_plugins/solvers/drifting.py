"""Choice programs whose errors partly add up in amplitude: the exact program, beam search and greedy.

    minimise    sum_i r[i, o_i]  +  | sum_i c[i, o_i] |^2
    subject to  sum_i cost_c[i, o_i] <= limit_c        for every budget c

``r`` adds up in power over choice sets, the amplitudes ``c`` add up as they are (`dq_plugins.sensitivity.drift`). The
objective is convex, so every tangent of the square, ``2 s_0 s - s_0^2 <= s^2``, is a bound from below. CP-SAT solves
the linear program over the tangents so far, the answer's own tangent joins them, and when the value of an answer meets
the bound it is the optimum (outer approximation: Kelley 1960; Duran and Grossmann 1986).

Beam search keeps, after each choice set, the partial choices that no other beats in cost and in error, thinned to a
width; it is what AdaTSQ (arXiv 2602.09883) searches widths over layers and timesteps with.

Shapes: ``N`` choice sets, ``K`` columns, ``F`` directions of drift, ``C`` budgets, ``S`` partial choices.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from math import fsum
from typing import TYPE_CHECKING

import numpy as np

from dq_plugins.errors import BudgetError
from dq_plugins.solvers.answer import nearest_limits
from dq_plugins.solvers.integers import EXPONENT, add_choice_sets, chosen_columns, power_of_two, to_integers
from dq_plugins.solvers.program import Choice, ChoiceProgram, Floats
from dq_plugins.solvers.solution import NO_CHOICE, Solution, Status, Use

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

ROUNDS = 40
"""Most tangents that are added."""
CLOSE = 1e-6
"""Relative gap at which the bound counts as met: the rounding of the integers is a good part of it."""
EXACT_EXPONENT = EXPONENT - 8
"""Of the largest number: with larger ones CP-SAT has proven bounds that are above the optimum."""


@dataclass(frozen=True, eq=False)
class DriftingProgram:
    """A program; see the module's formula.

    Attributes:
        linear: the choice sets, ``r`` and the budgets.
        drift: ``c``, ``[K, F]``.
    """

    linear: ChoiceProgram
    drift: Floats

    def __post_init__(self) -> None:
        if self.drift.ndim != 2 or len(self.drift) != len(self.linear.error) or not np.isfinite(self.drift).all():
            raise BudgetError(
                f"drifts are finite amplitudes [{len(self.linear.error)}, directions], got {self.drift.shape}"
            )

    def value(self, choice: Choice) -> float:
        """The objective of a choice."""
        return self.linear.value(choice) + fsum(fsum(row) ** 2 for row in self.drift[choice].T)

    @cached_property
    def shares(self) -> Floats:
        """What every column costs, ``[C, K]``, above the cheapest of its set and in fractions of the room there is."""
        rows = []
        for budget in self.linear.budgets:
            least = self.linear.cheapest(budget.cost)
            room = budget.limit - budget.used(least)
            rows.append((budget.cost - budget.cost[least][self.linear.set_of]) / (room if room > 0 else 1e-300))
        return np.array(rows).reshape(len(rows), len(self.linear.error))


def greedy_drifting(program: DriftingProgram) -> Choice | None:
    """Start at the cheapest columns and always buy the change that saves the most error per budget used, ``[N]``.

    None when the cheapest columns exceed a budget.
    """
    linear, drift, shares = program.linear, program.drift, program.shares
    choice = linear.cheapest(shares.sum(0), ties=linear.error)
    if not linear.feasible(choice):
        return None
    while True:
        own = choice[linear.set_of]  # [K]
        change = drift - drift[own]
        total = drift[choice].sum(0)
        saved = linear.error[own] - linear.error - (2 * change @ total + np.square(change).sum(1))
        extra = shares - shares[:, own]  # [C, K]
        room = 1 - shares[:, choice].sum(1, keepdims=True)
        fits = (saved > 1e-15 * abs(program.value(choice))) & (extra <= room + 1e-12).all(0)
        rate = np.where(fits, saved / np.maximum(extra.sum(0), 1e-12), -np.inf)
        column, before = int(rate.argmax()), choice
        if not fits[column]:
            return before
        choice = before.copy()
        choice[linear.set_of[column]] = column
        if not linear.feasible(choice) or program.value(choice) >= program.value(before):
            return before


def beam_search(program: DriftingProgram, width: int = 64) -> Choice | None:
    """The best choice that a beam of so many partial choices finds, ``[N]``; None: it finds none within the budgets.

    Args:
        program: the program.
        width: partial choices that are kept after each choice set.
    """
    linear, shares = program.linear, program.shares
    error, drift = np.zeros(1), np.zeros((1, program.drift.shape[1]))
    spent, taken = np.zeros((len(shares), 1)), np.zeros((1, 0), dtype=np.int64)
    for columns in map(list, linear.choice_sets()):
        parent = np.repeat(np.arange(len(error)), len(columns))
        column = np.tile(columns, len(error))
        error, drift = error[parent] + linear.error[column], drift[parent] + program.drift[column]
        spent = spent[:, parent] + shares[:, column]
        taken = np.concatenate([taken[parent], column[:, None]], axis=1)
        # the sets to come can always take what costs nothing above their cheapest
        kept = np.flatnonzero((spent <= 1 + 1e-12).all(0))
        kept = kept[_front(spent[:, kept].sum(0), (error + np.square(drift).sum(1))[kept], width)]
        error, drift, spent, taken = error[kept], drift[kept], spent[:, kept], taken[kept]
    found = [choice for choice in taken if linear.feasible(choice)]
    return min(found, key=program.value, default=None)


def _front(cost: Floats, error: Floats, width: int) -> np.ndarray:
    """Places of those that no other beats in cost and error; evenly spread, at most ``width``."""
    order = np.lexsort((error, cost))
    before = np.concatenate([[np.inf], np.minimum.accumulate(error[order])[:-1]])
    front = order[error[order] < before]
    if len(front) <= width:
        return front
    return front[np.unique(np.linspace(0, len(front) - 1, width).round().astype(int))]


@dataclass
class _Tangents:
    """The linear program over tangents, in the integers of CP-SAT."""

    program: DriftingProgram
    points: list[Floats] = field(default_factory=list)

    def solve(self, start: Choice | None, seconds: float) -> tuple[Choice | None, float, bool, bool, float]:
        """Best choice of the linear program, a bound, whether each is proven: optimal, infeasible; seconds spent."""
        from ortools.sat.python import cp_model

        linear, model = self.program.linear, cp_model.CpModel()
        chosen = add_choice_sets(model, linear)
        for costs, limit, _ in to_integers(linear).rows:
            model.add(cp_model.LinearExpr.weighted_sum(chosen, costs.tolist()) <= limit)
        scale, squares = self._squares(model, chosen)
        error = np.floor(linear.error * scale).astype(np.int64)
        model.minimize(cp_model.LinearExpr.weighted_sum(chosen, error.tolist()) + sum(squares))
        if start is not None:
            for variable, is_taken in zip(chosen, linear.taken(start), strict=True):
                model.add_hint(variable, is_taken)
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.max_deterministic_time = seconds
        status = solver.solve(model)
        found = chosen_columns(solver, chosen) if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) else None
        infeasible = status == cp_model.INFEASIBLE
        bound = np.inf if infeasible else solver.best_objective_bound / scale
        return found, bound, status == cp_model.OPTIMAL, infeasible, float(solver.response_proto.deterministic_time)

    def _squares(self, model: cp_model.CpModel, chosen: list) -> tuple[float, list]:
        """Integer units for one unit of the objective, and for every direction a variable above all its tangents."""
        from ortools.sat.python import cp_model

        drift, starts = self.program.drift, self.program.linear.start[:-1]
        most = [np.maximum.reduceat(np.abs(row), starts).sum() for row in drift.T]  # of |s|, by direction
        largest = max(float(self.program.linear.error.max()), 2 * max(most, default=0.0) ** 2, 1e-200)
        scale = power_of_two(np.array([largest]), EXACT_EXPONENT)
        squares = []
        for direction, reach in enumerate(most):
            square = model.new_int_var(0, int(reach * reach * scale) + 1, "")
            squares.append(square)
            for point in self.points:
                at = point[direction]
                # rounded down: a tangent stays below the square
                slope = np.floor(2 * at * drift[:, direction] * scale).astype(np.int64)
                model.add(
                    square >= cp_model.LinearExpr.weighted_sum(chosen, slope.tolist()) - int(np.ceil(at * at * scale))
                )
        return scale, squares


def solve_drifting(program: DriftingProgram, *, seconds: float = 20.0, beam: int = 64) -> Solution:
    """The exact program.

    Args:
        program: the program.
        seconds: CP-SAT's deterministic time for all tangents together: about a second each on an idle core.
        beam: width of the beam search that it starts from, beside greedy: its answer is never worse than either.

    Returns:
        The solution; ``optimal`` where the bound is met within a relative `CLOSE`. It has no prices.
    """
    began = time.perf_counter()
    known = [each for each in (greedy_drifting(program), beam_search(program, beam)) if each is not None]
    best = min(known, key=program.value, default=None)
    tangents, bound, infeasible, left = _Tangents(program), 0.0, False, seconds
    tangents.points += [program.drift[choice].sum(0) for choice in known]
    for _ in range(ROUNDS):
        found, below, _, infeasible, spent = tangents.solve(best, left)
        left -= max(spent, 1e-3)
        if infeasible:
            break
        bound = max(bound, below)
        if found is None:
            break
        best = found if best is None else min(best, found, key=program.value)
        value, point = program.value(best), program.drift[found].sum(0)
        if value - bound <= CLOSE * value or left <= 0 or any(np.array_equal(point, p) for p in tangents.points):
            break
        tangents.points.append(point)
    infeasible &= best is None
    return _solution(program, best, bound, infeasible, time.perf_counter() - began)


def _solution(
    program: DriftingProgram, best: Choice | None, bound: float, infeasible: bool, seconds: float
) -> Solution:
    linear = program.linear
    value = np.inf if best is None else program.value(best)
    close = CLOSE * abs(value) if best is not None else 0.0
    status: Status = "infeasible" if infeasible else "unknown"
    if best is not None:
        status = "optimal" if value - bound <= close else "feasible"
    return Solution(
        status,
        NO_CHOICE if best is None else best,
        value,
        np.inf if infeasible else min(bound, value),
        tuple(Use(b.name, 0.0 if best is None else b.used(best), b.limit, 0.0, b.unit) for b in linear.budgets),
        "cp-sat, tangents",
        seconds,
        close,
        nearest_limits(linear) if infeasible else {},
    )
