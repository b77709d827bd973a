"""dq-plugins for torchao: timestep-grouped int8 layers behind ``quantize_`` and behind a plan."""

from dq_plugins.errors import require

require("torchao", "torchao", "use dq_torchao")

from dq_torchao.adapter import TorchAOAdapter, apply  # noqa: E402
from dq_torchao.calibration import convert, prepare  # noqa: E402
from dq_torchao.config import TimestepInt8Config, linear_and_conv2d  # noqa: E402
from dq_torchao.report import Execution, Timing, execution_report  # noqa: E402
from dq_torchao.tuning import tune  # noqa: E402

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
