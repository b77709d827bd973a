"""Quantization passes for diffusion models, for torchao, Brevitas and plain PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dq_plugins.errors import DQError
from dq_plugins.registry import get, names, plugins, register, temporary
from dq_plugins.version import __version__ as __version__

if TYPE_CHECKING:  # what editors and type checkers see; at run time `__getattr__` imports each at its first use
    from dq_plugins.application import apply
    from dq_plugins.bundled_denoisers import bundled
    from dq_plugins.calibration import CalibrationSet, record
    from dq_plugins.graph import partition, trace
    from dq_plugins.plan import QuantPlan
    from dq_plugins.recipe import make_plan
    from dq_plugins.timesteps import Schedule, TimestepGroups

__all__ = [
    "CalibrationSet",
    "DQError",
    "QuantPlan",
    "Schedule",
    "TimestepGroups",
    "apply",
    "bundled",
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

# torch takes seconds to import: `dq-plugins --help` and a plugin that registers itself must not wait for it
_MODULES = {
    "apply": "application",
    "bundled": "bundled_denoisers",
    "CalibrationSet": "calibration",
    "record": "calibration",
    "partition": "graph",
    "trace": "graph",
    "QuantPlan": "plan",
    "make_plan": "recipe",
    "Schedule": "timesteps",
    "TimestepGroups": "timesteps",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
