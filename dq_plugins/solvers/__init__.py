"""Bit allocation as choice programs, and the solvers for them (plugins of kind ``solver``)."""

from dq_plugins.solvers.program import Budget, Choice, ChoiceProgram
from dq_plugins.solvers.solution import Solution, Solver, Use

__all__ = ["Budget", "Choice", "ChoiceProgram", "Solution", "Solver", "Use"]
