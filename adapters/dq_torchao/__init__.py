"""dq-plugins for torchao: timestep-grouped int8 layers behind ``quantize_`` and behind a plan."""

from dq_torchao.adapter import TorchAOAdapter, apply
from dq_torchao.report import Execution, execution_report

__all__ = ["Execution", "TorchAOAdapter", "apply", "execution_report"]
