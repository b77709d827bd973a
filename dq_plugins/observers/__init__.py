"""Observers: from activations, streamed by layer and timestep, to clip ranges and timestep groups."""

from dq_plugins.observers.error import ErrorTable
from dq_plugins.observers.grouping import Grouping, optimal_groups, uniform_groups
from dq_plugins.observers.observer import Observer
from dq_plugins.observers.observing import observe_groups

__all__ = [
    "ErrorTable",
    "Grouping",
    "Observer",
    "observe_groups",
    "optimal_groups",
    "uniform_groups",
]
