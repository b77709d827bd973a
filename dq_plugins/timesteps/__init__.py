"""Timesteps: the schedule, groups of timesteps, and the context that routes layers by the value of t."""

from dq_plugins.timesteps.context import OutOfRange, TimestepContext
from dq_plugins.timesteps.finite import NonFinite
from dq_plugins.timesteps.groups import TimestepGroups
from dq_plugins.timesteps.routing import argument_of, attach_context, context_of, detach_context, route_of
from dq_plugins.timesteps.schedule import Schedule
from dq_plugins.timesteps.selection import (
    RowOrder,
    Selection,
    by_sample_or_token,
    fewest_entries,
    fit_to_input,
    select_for_input,
    unpacked,
)

__all__ = [
    "NonFinite",
    "OutOfRange",
    "RowOrder",
    "Schedule",
    "Selection",
    "TimestepContext",
    "TimestepGroups",
    "argument_of",
    "attach_context",
    "by_sample_or_token",
    "context_of",
    "detach_context",
    "fewest_entries",
    "fit_to_input",
    "route_of",
    "select_for_input",
    "unpacked",
]
