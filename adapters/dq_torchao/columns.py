"""The activation parameters of all layers as columns of one table, in a graph whose weights inductor freezes.

A graph that selects scale and zero point for every layer by itself has some hundred tiny loops, and inductor compares
each with each when it looks for loops to merge: most of the time that compiling took. The tables are constants there,
so they are put side by side while it compiles, and a call selects one row for all layers.

An operator hands the row out as one small tensor for each layer. As parts of one tensor they would differ by a number
in the source of the loops that read them, and loops of equal blocks would be compiled one by one.

Shapes: ``G`` groups, ``L`` layers (and operands of attentions) with parameters of the same groups.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dq_plugins.quantized.input_quantizers import ActivationQuantizer
from dq_plugins.timesteps import TimestepContext
from dq_torchao.kernels import code_offset, is_frozen
from dq_torchao.timestep_state import NAME, TimestepState

torch.library.define("dq_torchao::columns", "(Tensor row) -> Tensor[]")
ALIGNED = 16
"""Bytes from one to the next: compiled code takes every tensor that an operator makes for aligned to as many."""


def _columns(row: Tensor) -> list[Tensor]:
    # over one allocation, but of no common storage: an operator's results may share none
    values = row.detach().reshape(-1).numpy()
    apart = np.zeros((len(values), ALIGNED // values.itemsize), values.dtype)
    apart[:, 0] = values
    return [torch.from_numpy(each) for each in apart[:, :1]]


torch.library.impl("dq_torchao::columns", "CPU")(_columns)
torch.library.register_fake("dq_torchao::columns")(lambda row: [row.new_empty(1) for _ in range(row.numel())])


def enlist(denoiser: nn.Module, name: str) -> None:
    """Give a quantized layer, or an operand of an attention, its column; nothing happens to other modules."""
    module, state = denoiser.get_submodule(name), getattr(denoiser, NAME, None)
    if not isinstance(state, TimestepState) or _table(module) is None:
        return
    names = state.columns.setdefault(_groups(module), [])
    if name not in names:
        module.column = len(names)  # type: ignore[assignment]
        names.append(name)


def enlist_all(denoiser: nn.Module) -> None:
    """`enlist` everything that is there."""
    for name, _ in denoiser.named_modules():
        enlist(denoiser, name)


def selected_column(module: Any, context: TimestepContext) -> tuple[Tensor, Tensor, Tensor] | None:
    """Scale, zero point, and zero point of the stored codes that a call selects for one module, each ``[1]``.

    Returns:
        None where this is not a frozen graph of the whole denoiser, or a call with several timesteps.
    """
    selection, groups = context.selection, _groups(module)
    if not selection.traced or selection.denoiser is None or not is_frozen(module_device(module)):
        return None
    state = getattr(selection.denoiser, NAME, None)
    names = () if state is None else state.columns.get(groups, ())
    column = getattr(module, "column", len(names))
    index = context.index(groups)
    if index.numel() != 1 or column >= len(names) or selection.denoiser.get_submodule(names[column]) is not module:
        return None
    key = ("columns", groups)
    if key not in selection.per_call:
        tables = [_table(selection.denoiser.get_submodule(name)) for name in names]
        scale, zero_point = (_side_by_side(list(part)) for part in zip(*tables, strict=True))
        row = [table.index_select(0, index.reshape(-1)) for table in (scale, zero_point)]  # [1, L]
        row.append(row[1] + code_offset(scale.device))
        selection.per_call[key] = [*(torch.ops.dq_torchao.columns(each) for each in row), _firsts(scale, zero_point)]
    scale, zero_point, stored, firsts = selection.per_call[key]
    first = firsts[column]
    return scale[first], zero_point[first], stored[first]


@torch.compiler.assume_constant_result
def _firsts(scale: Tensor, zero_point: Tensor) -> list[int]:
    """For every column of two tables ``[G, L]``, the first that is like it, in both.

    Layers that share an input (query, key, value) mostly have the same ranges. Where they take them from one place, a
    compiler sees that their codes are the same. The tables are frozen anyway, so a constant may follow from them.
    """
    columns = list(zip(scale.mT.tolist(), zero_point.mT.tolist(), strict=True))
    return [columns.index(column) for column in columns]


def _side_by_side(tables: list[Tensor]) -> Tensor:
    """``[G, L]``; a table with one row has it in every group."""
    most = max(len(table) for table in tables)
    return torch.stack([table.expand(most) for table in tables], 1)


def module_device(module: Any) -> torch.device:
    """Where the parameters of a module lie."""
    table = _table(module)
    assert table is not None
    return table[0].device


def _groups(module: Any) -> str:
    return module.groups if isinstance(module, ActivationQuantizer) else module.group_name


def _table(module: Any) -> tuple[Tensor, Tensor] | None:
    """Scale and zero point of every group, ``[G]``: of an operand of an attention, or of an integer layer."""
    if isinstance(module, ActivationQuantizer):
        return module.scale, module.zero_point
    scale, zero_point = (getattr(module, name, None) for name in ("act_scale", "act_zero_point"))
    return None if scale is None or zero_point is None else (scale, zero_point)
