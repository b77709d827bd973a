"""State of an interrupted search on disk: parameters, optimiser and iteration, in one safetensors file."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dq_plugins.atomic import write_atomically
from dq_plugins.passes.ranges.search.relaxation import Relaxation


def save_checkpoint(
    file: Path | None, signature: str, iteration: int, relaxation: Relaxation, optimiser: torch.optim.Optimizer
) -> None:
    """Write the state; nothing happens without a file."""
    if file is None:
        return
    tensors: dict[str, Tensor] = {f"parameter/{n}": p.detach().contiguous() for n, p in relaxation.named_parameters()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"adam/{index}/{name}": value.contiguous() for name, value in state.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, safetensors.torch.save(tensors, {"signature": signature, "iteration": str(iteration)}))


def load_checkpoint(file: Path | None, signature: str, relaxation: Relaxation, optimiser: torch.optim.Optimizer) -> int:
    """Restore the state in place; returns the number of iterations that were done, 0 where there is no such state."""
    if file is None or not file.is_file():
        return 0
    try:
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata()
            if metadata["signature"] != signature:
                return 0
            tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError):
        return 0  # cut off while it was written, or another's: the search starts again
    with torch.no_grad():
        for name, parameter in relaxation.named_parameters():
            parameter.copy_(tensors[f"parameter/{name}"])
    state = optimiser.state_dict()
    state["state"] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "adam":
            index, _, what = rest.partition("/")
            state["state"].setdefault(int(index), {})[what] = value
    optimiser.load_state_dict(state)
    return int(metadata["iteration"])
