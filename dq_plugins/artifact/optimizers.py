"""What an optimizer has learned about gradients, as part of an artifact."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dq_plugins.artifact.codec import StoredTensor

OptimizerState = dict[str, dict[str, StoredTensor]]
"""State by index of the parameter and by name; the numbers are tensors in every torch optimizer that has state."""


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The state, without the hyper-parameters."""
    state = optimizer.state_dict()["state"]
    return {str(index): {name: torch.as_tensor(v) for name, v in values.items()} for index, values in state.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put a state in place; the hyper-parameters stay those of this run."""
    found = {int(index): dict(values) for index, values in state.items()}
    optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})
