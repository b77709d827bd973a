"""Inputs and targets of one block, recorded on disk and read back a call at a time.

The target is the full-precision block's output in the full-precision denoiser; the input is what the block gets in a
denoiser whose weights are already quantized ("asymmetric" reconstruction: a block also mends what came before it).
Memory holds one call at a time, whatever the number of calls.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from dq_plugins.calibration import CalibrationSet
from dq_plugins.calibration.call import Call, first_tensor
from dq_plugins.errors import CalibrationError
from dq_plugins.graph.arguments import map_leaves, named_leaves
from dq_plugins.hooks import hooked


class _Reached(Exception):  # noqa: N818
    """The block has run; the rest of the denoiser need not."""


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

    def get(self, index: int) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
        """Positional arguments, keyword arguments and target of one call."""
        tensors = safetensors.torch.load_file(_file(self.folder, index))
        arguments = map_leaves(self._templates[index], lambda name, value: tensors.get(name, value))
        return tuple(arguments["args"]), arguments["kwargs"], tensors["target"]


def record_block(
    full: nn.Module, quantized: nn.Module, name: str, calls: CalibrationSet, wanted: list[int], folder: Path
) -> BlockCache:
    """Run both denoisers up to the block on some recorded calls.

    Args:
        full: full-precision denoiser, which gives the targets.
        quantized: denoiser with quantized weights, which gives the inputs.
        name: fully qualified name of the block.
        calls: recorded calls.
        wanted: indices of the calls to use, in the order of `CalibrationSet.calls`.
        folder: where to write.

    Raises:
        CalibrationError: the block does not run, or gives no tensor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    templates = []
    chosen = set(wanted)
    for call in calls.calls():
        if call.index not in chosen:
            continue
        _, _, target = _run_to(full, name, call)
        args, kwargs, _ = _run_to(quantized, name, call)
        arguments = {"args": list(args), "kwargs": kwargs}
        tensors = {n: v.contiguous().clone() for n, v in named_leaves(arguments) if isinstance(v, Tensor)}
        safetensors.torch.save_file({**tensors, "target": target.contiguous()}, _file(folder, len(templates)))
        templates.append(map_leaves(arguments, lambda _, value: None if isinstance(value, Tensor) else value))
    return BlockCache(folder, templates)


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
