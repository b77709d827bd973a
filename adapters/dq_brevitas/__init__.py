"""Brevitas adapter: quantizers that know the timestep, plans as layer maps, and plans read back after training.

Importing this package needs Brevitas; its parts are loaded at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dq_plugins.errors import require

require("brevitas", "brevitas", "use dq_brevitas")

_HOME = {
    "BrevitasAdapter": "adapter",
    "attach_timesteps": "routing",
    "bake_weights": "weights",
    "binary_layer_map": "binary",
    "calibration_coverage": "proxy",
    "convert_to_timestep": "conversion",
    "evenly_spaced_groups": "routing",
    "export_onnx_qcdq": "export",
    "export_torch": "export",
    "float_model": "plain",
    "freeze_binary": "binary",
    "freeze_timestep_group": "conversion",
    "inference_mode": "export",
    "layer_map": "lowering",
    "load": "files",
    "onnxruntime_options": "export",
    "plan_from_model": "reading",
    "restart_calibration": "proxy",
    "save": "files",
}
_QUANTIZERS = (
    "EvolvableBasisWeight",
    "Int8ActFiniteSetFloat",
    "Int8ActLearnedStep",
    "Int8ActPerTimestepFloat",
    "Int8ActPerTimestepFloatMSE",
    "Int8DynamicActPerTokenFloat",
    "Int8DynamicAsymmetricActPerTokenFloat",
    "ShiftedUint8ActFiniteSetFloat",
    "ShiftedUint8ActPerTimestepFloat",
    "SignedBinaryWeightPerChannelFloat",
    "Uint8ActPerTimestepFloat",
)
_HOME |= dict.fromkeys(_QUANTIZERS, "quantizers")

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
