"""Training checkpoints without pickle: one safetensors file with weights, optimizer state and counters.

Sampling for validation, a moving average and the mimicked directions go in as well, so that a resumed run continues
where it stopped. The file is written beside its place and moved: a run killed while it saves keeps its last checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from dq_plugins.errors import DQError
from dq_plugins.passes.binarization.callback import BinaryDMCallback


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State by ``<parameter index>/<name>``; the numbers are tensors in every torch optimizer that has state."""
    state = optimizer.state_dict()["state"]
    return {f"{index}/{name}": torch.as_tensor(value) for index, s in state.items() for name, value in s.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = value
    # param_groups hold the hyper-parameters of this run; the checkpoint carries what was learned about gradients
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


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
        path: file to write.
        step: iterations done.
        model: the student.
        optimizer: its optimizer.
        callback: its callback.
        notes: anything JSON holds, such as a loss history.

    Returns:
        The path.
    """
    parts = {"model": model.state_dict(), "optimizer": _optimizer_tensors(optimizer), "callback": callback.state_dict()}
    tensors = {f"{part}|{k}": v.detach().cpu().contiguous().clone() for part, d in parts.items() for k, v in d.items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    metadata = {"step": str(step), "notes": json.dumps(dict(notes or {}))}
    safetensors.torch.save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, path)
    return path


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
        DQError: the file cannot be read, or is of another model.
    """
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "callback": {}}
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata()
            for key in file.keys():  # noqa: SIM118  not a dict
                part, _, name = key.partition("|")
                parts[part][name] = file.get_tensor(key)
        step, notes = int(metadata["step"]), json.loads(metadata["notes"])
        model.load_state_dict(parts["model"])
        _load_optimizer(optimizer, parts["optimizer"])
        callback.load_state_dict(parts["callback"])
    except Exception as error:  # safetensors, torch and json raise types of their own: all mean the same here
        raise DQError(f"{path} is not a checkpoint of this model and optimizer: {error}") from error
    return step, notes
