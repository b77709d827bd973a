"""dq-plugins for torchao: timestep-grouped int8 layers behind ``quantize_`` and behind a plan."""

import logging

from dq_plugins.errors import CheckpointError, require
from dq_plugins.quiet import loggers_at

require("torchao", "torchao", "use dq_torchao")
# its import reports GPU kernels that fail to load on other machines, and a deprecated registration of its own
with loggers_at(logging.ERROR, ("torchao", "torch.utils._pytree")):
    import torchao as torchao

from dq_torchao import config_data as config_data  # noqa: E402
from dq_torchao.adapter import TorchAOAdapter, apply  # noqa: E402
from dq_torchao.calibration import convert, prepare  # noqa: E402
from dq_torchao.checkpoint import load, save  # noqa: E402
from dq_torchao.checkpoint_config import CheckpointConfig  # noqa: E402
from dq_torchao.fqn import FqnLowering, to_fqn_config  # noqa: E402
from dq_torchao.intx import intx_tensor  # noqa: E402
from dq_torchao.latency import LatencyTable, latency_table  # noqa: E402
from dq_torchao.layer_filter import LayerFilter, linear_and_conv2d  # noqa: E402
from dq_torchao.lora import merge_lora  # noqa: E402
from dq_torchao.plan_config import PlanConfig  # noqa: E402
from dq_torchao.regions import compile_regions, repeated_blocks  # noqa: E402
from dq_torchao.releasing import release_weights, restore_weights  # noqa: E402
from dq_torchao.report import Execution, Timing, execution_report  # noqa: E402
from dq_torchao.timestep_config import TimestepInt8Config  # noqa: E402
from dq_torchao.tuning import tune  # noqa: E402

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "Execution",
    "FqnLowering",
    "LatencyTable",
    "LayerFilter",
    "PlanConfig",
    "TimestepInt8Config",
    "Timing",
    "TorchAOAdapter",
    "apply",
    "compile_regions",
    "convert",
    "execution_report",
    "intx_tensor",
    "latency_table",
    "linear_and_conv2d",
    "load",
    "merge_lora",
    "prepare",
    "release_weights",
    "repeated_blocks",
    "restore_weights",
    "save",
    "to_fqn_config",
    "tune",
]
