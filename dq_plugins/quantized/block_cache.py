"""Inputs and targets of one block, recorded on disk and read back a call at a time.

The target is the full-precision block's output in the full-precision denoiser; the input is what the block gets in a
denoiser whose layers are already quantized ("asymmetric" reconstruction: a block also mends what came before it).
Memory holds one call at a time, whatever the number of calls.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from dq_plugins.artifact.files import read_tensors
from dq_plugins.calibration import CalibrationSet
from dq_plugins.calibration.call import Call, first_tensor
from dq_plugins.errors import CalibrationError
from dq_plugins.graph.arguments import map_leaves, named_leaves
from dq_plugins.hooks import hooked
from dq_plugins.quantized.reconstruction_units import Unit
from dq_plugins.quantized.run import QuantizedRun, States


class _Reached(Exception):  # noqa: N818
    """The block has run; the rest of the denoiser need not."""


class BlockCall(NamedTuple):
    """One recorded call of a block: its arguments, the output it should have, and the timestep of the denoiser."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    timestep: Tensor


class BlockCache:
    """Recorded calls of one block.

    Args:
        folder: where the calls lie, one file each.
        templates: arguments of each call with ``None`` in place of tensors.
    """

    def __init__(self, folder: Path, templates: list[dict[str, Any]]) -> None:
        self.folder, self._templates = folder, templates

    def __len__(self) -> int:
        return len(self._templates)

    def get(self, index: int) -> BlockCall:
        """One call."""
        _, tensors = read_tensors(_file(self.folder, index))
        arguments = map_leaves(self._templates[index], lambda name, value: tensors.get(name, value))
        return BlockCall(tuple(arguments["args"]), arguments["kwargs"], tensors["target"], tensors["timestep"])


def record_block(
    run: QuantizedRun, name: str, calls: CalibrationSet, folder: Path, states: Callable[[], States]
) -> BlockCache:
    """Run the denoiser up to the block on recorded calls, in full precision and quantized.

    Args:
        run: of the denoiser; open. In full precision it gives the targets, quantized the inputs.
        name: fully qualified name of the block.
        calls: recorded calls to use.
        folder: where to write.
        states: what layers compute with when the inputs are made; asked for each call.

    Raises:
        CalibrationError: the block does not run, or gives no tensor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    templates = []
    for call in calls.calls():
        run.use({})
        _, _, target = _run_to(run.denoiser, name, call)
        run.use(states())
        args, kwargs, _ = _run_to(run.denoiser, name, call)
        arguments = {"args": list(args), "kwargs": kwargs}
        tensors = {n: v.contiguous().clone() for n, v in named_leaves(arguments) if isinstance(v, Tensor)}
        tensors |= {"target": target.contiguous(), "timestep": call.timestep}
        safetensors.torch.save_file(tensors, _file(folder, len(templates)))
        templates.append(map_leaves(arguments, lambda _, value: None if isinstance(value, Tensor) else value))
    run.use({})
    return BlockCache(folder, templates)


def block_loss(run: QuantizedRun, unit: Unit, cache: BlockCache, index: int, states: States) -> Tensor:
    """Error of a block's output in one recorded call: squared, summed over channels, mean over positions.

    Args:
        run: of the denoiser; open.
        unit: the block.
        cache: its recorded calls.
        index: which of them.
        states: what the block's layers compute with; differentiable in whatever requires gradients.
    """
    call = cache.get(index)
    run.use(states)
    with run.at(call.timestep):
        output = first_tensor(run.denoiser.get_submodule(unit.module)(*call.args, **call.kwargs))
    return (output - call.target).square().sum(unit.channel_axis).mean()


def _file(folder: Path, index: int) -> Path:
    return folder / f"call-{index}.safetensors"


def _run_to(denoiser: nn.Module, name: str, call: Call) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Arguments and output of a block in one call of the denoiser, which stops there."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

    def stop(_: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append((args, kwargs, first_tensor(output)))
        raise _Reached

    with hooked({name: denoiser.get_submodule(name)}, after=stop), torch.no_grad(), suppress(_Reached):
        call.run(denoiser)
    if seen:
        return seen[0]
    raise CalibrationError(f"block {name!r} did not run in recorded call {call.index}, so it cannot be reconstructed")
