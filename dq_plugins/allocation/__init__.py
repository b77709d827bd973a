"""Which layer gets how many bits: budgets and menus as a choice program, its solution, and why."""

from dq_plugins.allocation.explain import LayerReason, explain, explanation, table_of_reasons
from dq_plugins.allocation.front import Front, front_figure, fronts, uniform_points
from dq_plugins.allocation.problem import Allocation, AllocationProblem, Budgets, LayerCost, Menu, Width, allocate

__all__ = [
    "Allocation",
    "AllocationProblem",
    "Budgets",
    "Front",
    "LayerCost",
    "LayerReason",
    "Menu",
    "Width",
    "allocate",
    "explain",
    "explanation",
    "front_figure",
    "fronts",
    "table_of_reasons",
    "uniform_points",
]
