"""Training checkpoints: weights, optimizer state and counters in one artifact.

Sampling for validation, a moving average and the mimicked directions go in as well, so that a resumed run continues
where it stopped. A run that is killed while it saves keeps its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dq_plugins.artifact import STRICT, Format, StoredTensor
from dq_plugins.artifact.optimizers import OptimizerState, optimizer_state, restore_optimizer
from dq_plugins.errors import ArtifactError, CheckpointError
from dq_plugins.passes.binarization.callback import BinaryDMCallback


@dataclass(frozen=True)
class TrainingState:
    """What a training run goes on from."""

    __pydantic_config__ = STRICT

    step: int
    model: dict[str, StoredTensor]
    optimizer: OptimizerState
    callback: dict[str, StoredTensor]
    notes: dict[str, Any]


CHECKPOINT: Format[TrainingState] = Format(
    "binary-training", 2, TrainingState, CheckpointError, "a training checkpoint", "Delete it, and train again."
)


def save_checkpoint(
    path: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    callback: BinaryDMCallback,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint.

    Args:
        path: file to write, ``.safetensors``.
        step: iterations done.
        model: the student.
        optimizer: its optimizer.
        callback: its callback.
        notes: anything JSON holds, such as a loss history.

    Returns:
        The path.
    """
    state = TrainingState(
        step, model.state_dict(), optimizer_state(optimizer), callback.state_dict(), dict(notes or {})
    )
    return CHECKPOINT.write(path, state)


def load_checkpoint(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, callback: BinaryDMCallback
) -> tuple[int, dict[str, Any]]:
    """Go on from a checkpoint.

    Args:
        path: file that `save_checkpoint` wrote.
        model: a student built the same way.
        optimizer: built the same way; its hyper-parameters stay.
        callback: built the same way.

    Returns:
        Iterations done, and the notes.

    Raises:
        CheckpointError: the file cannot be read, or is of another model.
    """
    state = CHECKPOINT.read(path)
    try:
        model.load_state_dict(state.model)
        restore_optimizer(optimizer, state.optimizer)
        callback.load_state_dict(state.callback)
    except (ArtifactError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of this model and optimizer: {error}") from error
    return state.step, state.notes
