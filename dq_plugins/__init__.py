"""Quantization passes for diffusion models, for torchao, Brevitas and plain PyTorch."""

from dq_plugins.application import apply
from dq_plugins.calibration import CalibrationSet, record
from dq_plugins.errors import DQError
from dq_plugins.graph import partition, trace
from dq_plugins.plan import QuantPlan
from dq_plugins.recipe import make_plan
from dq_plugins.registry import get, names, plugins, register, temporary
from dq_plugins.timesteps import Schedule, TimestepGroups
from dq_plugins.version import __version__ as __version__

__all__ = [
    "CalibrationSet",
    "DQError",
    "QuantPlan",
    "Schedule",
    "TimestepGroups",
    "apply",
    "get",
    "make_plan",
    "names",
    "partition",
    "plugins",
    "record",
    "register",
    "temporary",
    "trace",
]
