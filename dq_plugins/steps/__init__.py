"""Fewer timesteps: groups to choose them from, samplers that visit any of them, and what leaving some out costs."""

from dq_plugins.steps.groups import Grouping, StepGroups, step_groups
from dq_plugins.steps.runs import Path, Run, recorded_path, runs_of
from dq_plugins.steps.stepper import SamplingRun, Stepper, stepper_of

__all__ = [
    "Grouping",
    "Path",
    "Run",
    "SamplingRun",
    "StepGroups",
    "Stepper",
    "recorded_path",
    "runs_of",
    "step_groups",
    "stepper_of",
]
