"""What kind of graph is being traced."""

from __future__ import annotations

import torch


def is_merged(device: torch.device) -> bool:
    """Whether a graph for inference on a CPU is being traced now, as `dq_torchao.kernels.graphs` says."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return device.type == "cpu" and not torch.is_grad_enabled()
