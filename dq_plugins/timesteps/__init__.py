"""Timesteps: the schedule, groups of timesteps, and the context that routes layers by the value of t."""

from dq_plugins.timesteps.context import TimestepContext, argument_of, attach_context, context_of, detach_context
from dq_plugins.timesteps.groups import TimestepGroups
from dq_plugins.timesteps.schedule import Schedule

__all__ = [
    "Schedule",
    "TimestepContext",
    "TimestepGroups",
    "argument_of",
    "attach_context",
    "context_of",
    "detach_context",
]
