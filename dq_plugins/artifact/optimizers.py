"""What an optimizer has learned about gradients, as part of an artifact."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dq_plugins.artifact.codec import StoredTensor
from dq_plugins.errors import ArtifactError

OptimizerState = dict[str, dict[str, StoredTensor]]
"""State by index of the parameter and by name; the numbers are tensors in every torch optimizer that has state."""


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The state, without the hyper-parameters."""
    state = optimizer.state_dict()["state"]
    return {str(index): {name: torch.as_tensor(v) for name, v in values.items()} for index, values in state.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put a state in place; the hyper-parameters stay those of this run.

    Raises:
        ArtifactError: it is of other parameters. Fused optimizers read as much memory as a parameter has.
    """
    parameters = {str(i): p for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    for index, values in state.items():
        for name, value in values.items():
            if index not in parameters or value.shape not in ((), parameters[index].shape):
                raise ArtifactError(
                    f"the state of an optimizer is damaged, or of another one: {name!r} of parameter {index} has shape "
                    f"{list(value.shape)}"
                )
    found = {int(index): dict(values) for index, values in state.items()}
    optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})
