"""What a plugin of kind ``solver`` is."""

from __future__ import annotations

from typing import Any, Protocol

from dq_plugins.solvers.program import Choice, ChoiceProgram
from dq_plugins.solvers.solution import Solution


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
