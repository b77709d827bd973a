"""Which layer gets how many bits: budgets and menus as a choice program, its solution, and why."""

from dq_plugins.allocation.explain import LayerReason, explain, explanation, table_of_reasons
from dq_plugins.allocation.front import Front, front_figure, fronts, uniform_points
from dq_plugins.allocation.problem import AllocationProblem, Budgets, LayerCost
from dq_plugins.allocation.solve import Allocation, allocate
from dq_plugins.allocation.width import Menu, Width

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
