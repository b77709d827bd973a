"""dq-plugins for torchao: timestep-grouped int8 layers behind ``quantize_`` and behind a plan."""

from dq_torchao.adapter import TorchAOAdapter, apply
from dq_torchao.report import Execution, Timing, execution_report
from dq_torchao.tuning import tune

__all__ = ["Execution", "Timing", "TorchAOAdapter", "apply", "execution_report", "tune"]
