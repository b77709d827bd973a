"""dq-plugins for torchao: timestep-grouped int8 layers behind ``quantize_`` and behind a plan."""

from dq_torchao.adapter import TorchAOAdapter, apply
from dq_torchao.calibration import convert, prepare
from dq_torchao.config import TimestepInt8Config, linear_and_conv2d
from dq_torchao.report import Execution, Timing, execution_report
from dq_torchao.tuning import tune

__all__ = [
    "Execution",
    "TimestepInt8Config",
    "Timing",
    "TorchAOAdapter",
    "apply",
    "convert",
    "execution_report",
    "linear_and_conv2d",
    "prepare",
    "tune",
]
