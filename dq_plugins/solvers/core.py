"""Exact solution of a choice program through small cores.

Of a thousand layers only a few dozen are in doubt: for the others the relaxation's prices already decide. So

1. drop dominated columns, bound the optimum by the relaxation, round it to a first incumbent;
2. solve the *core* of columns with the least reduced costs, which gives a better incumbent;
3. once the core holds every column with ``reduced cost < incumbent - bound``, its optimum is the program's optimum.

Step 3 is a proof, not a heuristic; see `dq_plugins.solvers.relaxation`. Any exact solver can solve the cores.
Source: Pisinger (1995), core algorithms.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from dq_plugins.solvers.heuristics import improve, round_relaxation
from dq_plugins.solvers.nearest import nearest_limits
from dq_plugins.solvers.program import Choice, ChoiceProgram, Floats, Integers
from dq_plugins.solvers.relaxation import Relaxation, relax, undominated
from dq_plugins.solvers.solution import NO_CHOICE, Solution, uses_of

FIRST_CORE, GROWTH = 100, 3
"""Columns beyond one per menu in the first core, and by how much cores grow; measured in benchmarks/solvers.py."""


class CoreAnswer(NamedTuple):
    """What an exact solver says about a core.

    Attributes:
        proven: whether the search was exhausted (then ``choice`` is None only if nothing beats the cutoff).
        choice: columns of the core, ``[N]``, or None.
        bound: lower bound on the core's optimum (infinite when proven that nothing beats the cutoff).
        rounding: how far integer scaling may have moved an objective.
    """

    proven: bool
    choice: Choice | None
    bound: float
    rounding: float = 0.0


class CoreSolver(Protocol):
    """An exact solver of small choice programs."""

    def __call__(
        self, program: ChoiceProgram, *, hint: Choice | None, cutoff: float, tolerance: float, seconds: float
    ) -> CoreAnswer:
        """Solve ``program``: start from ``hint``, look only below ``cutoff``, stop at gap ``tolerance`` (absolute)."""
        ...


@dataclass
class _Search:
    """State of one solution process, in columns of the undominated program."""

    program: ChoiceProgram
    relaxation: Relaxation
    best: Choice | None
    rounding: float = 0.0

    @property
    def value(self) -> float:
        return np.inf if self.best is None else self.program.value(self.best)

    def offer(self, choice: Choice | None) -> None:
        if choice is not None and self.program.feasible(choice):
            choice = improve(self.program, choice)
            if self.program.value(choice) < self.value:
                self.best = choice

    def doubtful(self) -> int:
        """How many columns beyond one per menu may still be in a better choice."""
        gap = self.value - self.relaxation.bound
        return int((self.relaxation.reduced <= gap).sum()) - len(self.program.names)


def _core(search: _Search, size: int) -> tuple[ChoiceProgram, Integers, bool]:
    """The core with ``size`` columns beyond one per menu; whether it holds every doubtful column."""
    reduced = search.relaxation.reduced
    gap = search.value - search.relaxation.bound
    count = min(size + len(search.program.names), len(reduced)) - 1
    limit = float(np.partition(reduced, count)[count])
    complete = limit >= gap or count == len(reduced) - 1
    keep = reduced <= min(limit, gap)
    keep[search.program.cheapest(reduced)] = True
    if search.best is not None:
        keep[search.best] = True
    core, columns = search.program.restrict(keep)
    return core, columns, complete


def _position(columns: Integers, choice: Choice | None) -> Choice | None:
    return None if choice is None else np.searchsorted(columns, choice)


def solve_by_cores(
    program: ChoiceProgram,
    solver: CoreSolver,
    *,
    name: str,
    hint: Choice | None = None,
    tolerance: float = 0.0,
    seconds: float = 60.0,
    first_core: int = FIRST_CORE,
) -> Solution:
    """Solve ``program`` to proven optimality (or to ``tolerance``, relative) through growing cores.

    Args:
        program: the program.
        solver: solves the cores.
        name: name for the solution.
        hint: a choice to start from, ``[N]``; ignored when it is not feasible.
        tolerance: relative gap at which to stop; 0 for an exact proof.
        seconds: time to give the core solver for the last core; it gets a quarter of it for each one before.
        first_core: columns in doubt in the first core.
    """
    began = time.perf_counter()
    reduced, columns = program.restrict(undominated(program))
    relaxation = relax(reduced)
    search = _Search(reduced, relaxation, round_relaxation(reduced, relaxation))
    if hint is not None and np.isin(hint, columns).all():
        search.offer(np.searchsorted(columns, hint))
    exhausted, bound, core_size = False, relaxation.bound, (0, 0)
    size = first_core if relaxation.feasible else len(reduced.error)
    while True:
        allowed = tolerance * abs(search.value) if search.best is not None else 0.0
        if search.best is not None and search.value - relaxation.bound <= allowed:
            bound, exhausted = relaxation.bound, True
            break
        core, kept, complete = _core(search, size)
        doubtful = np.diff(core.start)
        core_size = (int((doubtful > 1).sum()), int(doubtful[doubtful > 1].sum()))
        answer = solver(
            core,
            hint=_position(kept, search.best),
            cutoff=search.value,
            tolerance=allowed,
            seconds=seconds if complete else seconds / 4,
        )
        search.rounding = max(search.rounding, answer.rounding)
        search.offer(None if answer.choice is None else kept[answer.choice])
        if complete:
            exhausted = answer.proven
            bound = max(relaxation.bound, min(answer.bound, search.value))
            break
        size *= GROWTH
    return _answer(program, search, columns, name, exhausted, bound, tolerance, began, core_size)


def _answer(
    program: ChoiceProgram,
    search: _Search,
    columns: Integers,
    name: str,
    exhausted: bool,
    bound: float,
    tolerance: float,
    began: float,
    core_size: tuple[int, int],
) -> Solution:
    """Put a finished search into words, in columns of the user's program."""
    found = search.best is not None
    status = ("optimal" if found else "infeasible") if exhausted else ("feasible" if found else "unknown")
    choice = columns[search.best] if search.best is not None else NO_CHOICE
    prices: Floats = search.relaxation.prices
    value = search.value
    return Solution(
        status=status,
        choice=choice,
        objective=value,
        bound=min(bound - search.rounding, value) if found else (np.inf if exhausted else bound),
        uses=uses_of(program, choice, prices),
        solver=name,
        seconds=time.perf_counter() - began,
        tolerance=search.rounding + (tolerance * abs(value) if found else 0.0),
        nearest={} if found or not exhausted else nearest_limits(program),
        menus=core_size,
    )
