"""Exports of models with timestep quantizers; the group table and its lookup are in the graph.

Brevitas imports ``onnx`` for every export, ``torch.export`` and inference mode included.
"""

from __future__ import annotations

from dq_plugins.errors import require

require("onnx", "export", "export a Brevitas model, or run it in inference mode")

from dq_brevitas.export.inference import TimestepInferenceManager, export_torch, inference_mode  # noqa: E402
from dq_brevitas.export.onnx import TimestepQCDQManager, export_onnx_qcdq, onnxruntime_options  # noqa: E402

__all__ = [
    "TimestepInferenceManager",
    "TimestepQCDQManager",
    "export_onnx_qcdq",
    "export_torch",
    "inference_mode",
    "onnxruntime_options",
]
