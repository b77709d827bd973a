"""The activation parameters of all layers, selected at once, in a graph of the whole denoiser for inference.

A graph that selects scale and zero point for every layer by itself has some hundred tiny loops, and inductor compares
each with each when it looks for loops to merge: most of the time that compiling took. So one operator takes the entries
of the selected group from all tables, and hands them out as small tensors. As parts of one tensor they would differ by
a number in the source of the loops that read them, and loops of equal blocks would be compiled one by one.

Shapes: ``G`` groups, ``L`` layers (and operands of attentions) with parameters of the same groups, ``U`` of them with
parameters of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dq_plugins.errors import DQError
from dq_plugins.quantized.input_quantizers import ActivationQuantizer
from dq_plugins.timesteps import TimestepContext
from dq_torchao.kernels import code_offset, is_merged
from dq_torchao.timestep_state import NAME, TimestepState

torch.library.define(
    "dq_torchao::columns", "(Tensor index, Tensor[] scales, Tensor[] zero_points, int[] ranks, int offset) -> Tensor[]"
)
ALIGNED = 4
"""Values of four bytes from one to the next: compiled code takes what an operator makes for aligned to 16 bytes."""
CHANGED = (
    "layers that had the same activation ranges when this denoiser was compiled no longer have, so what was compiled "
    "is not valid any more: call torch.compiler.reset() and compile it again"
)


class SelectedRange(NamedTuple):
    """What a call selects for one module, each ``[1]``.

    Attributes:
        scale: float32.
        factor: its reciprocal.
        zero_point: int32, of the stored codes.
    """

    scale: Tensor
    factor: Tensor
    zero_point: Tensor


def _columns(
    index: Tensor, scales: list[Tensor], zero_points: list[Tensor], ranks: list[int], offset: int
) -> list[Tensor]:
    """Scales, factors, and zero points of stored codes, ``[1]`` each: 3 U, one kind after the other.

    Args:
        index: ``[1]``.
        scales: ``[G]``, or ``[1]`` where it is the same in every group: L of them.
        zero_points: likewise, of signed codes.
        ranks: see `_ranks`.
        offset: of stored codes.
    """
    scale, zero_point = (_row(tables, int(index)) for tables in (scales, zero_points))
    last = {rank: place for place, rank in enumerate(ranks)}  # any of a rank serves, as the next check shows
    own = [last[rank] for rank in range(len(last))]
    one_scale, one_zero = scale[own], zero_point[own]
    if not (np.array_equal(one_scale[ranks], scale) and np.array_equal(one_zero[ranks], zero_point)):
        raise DQError(CHANGED)
    return _apart(np.concatenate([one_scale, 1 / one_scale])) + _apart(one_zero + np.int32(offset))


def _row(tables: list[Tensor], group: int) -> np.ndarray:
    """``[L]``."""
    flat = torch.cat(tables).detach().numpy()
    if len(flat) != len(tables) * len(tables[0]):  # a length is G or 1
        return np.array([table[group if len(table) > 1 else 0].item() for table in tables], flat.dtype)
    return flat.reshape(len(tables), -1)[:, group if len(tables[0]) > 1 else 0]


def _apart(values: np.ndarray) -> list[Tensor]:
    """``[1]`` each, over one allocation, but of no common storage: an operator's results may share none."""
    memory = np.empty((len(values), ALIGNED), values.dtype)
    memory[:, 0] = values
    return [torch.from_numpy(each) for each in memory[:, :1]]


torch.library.impl("dq_torchao::columns", "CPU")(_columns)


@torch.library.register_fake("dq_torchao::columns")
def _(index, scales: list[Tensor], zero_points: list[Tensor], ranks: list[int], offset: int) -> list[Tensor]:
    own = max(ranks) + 1
    return [like.new_empty(1) for like in (scales[0], scales[0], zero_points[0]) for _ in range(own)]


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


class _Selected(NamedTuple):
    modules: list[nn.Module]
    columns: list[SelectedRange]
    ranks: list[int]


def selected_column(module: Any, context: TimestepContext) -> SelectedRange | None:
    """What a call selects for one module.

    Returns:
        None where this is not a graph of the whole denoiser for inference, or a call with several timesteps.
    """
    selection = context.selection
    if not selection.traced or selection.denoiser is None:
        return None
    groups = _groups(module)
    key = ("columns", groups)
    if key not in selection.per_call:
        selection.per_call[key] = _select(selection.denoiser, groups, context.index(groups))
    selected: _Selected | None = selection.per_call[key]
    column = getattr(module, "column", None)
    if selected is None or column is None or column >= len(selected.modules):
        return None
    return selected.columns[selected.ranks[column]] if selected.modules[column] is module else None


def _select(denoiser: nn.Module, groups: str, index: Tensor) -> _Selected | None:
    state = getattr(denoiser, NAME, None)
    names = () if state is None else state.columns.get(groups, ())
    if not names or index.numel() != 1 or not is_merged(index.device):
        return None
    known: dict[str, Any] = {"": denoiser}
    modules, scales, zero_points = [], [], []
    for name in names:
        module = _submodule(known, name)
        table = _table(module)
        if table is None or table[0].device != index.device:
            return None
        modules.append(module)
        scales.append(table[0])
        zero_points.append(table[1])
    ranks = _ranks(*scales, *zero_points)
    found = torch.ops.dq_torchao.columns(index.reshape(-1), scales, zero_points, ranks, code_offset(index.device))
    own = len(found) // 3
    return _Selected(modules, [SelectedRange(*found[rank::own]) for rank in range(own)], ranks)


def _submodule(known: dict[str, Any], name: str) -> Any:
    """``get_submodule``, which traces as many lookups as a name has parts; most names share all but the last."""
    if name not in known:
        parent, _, last = name.rpartition(".")
        known[name] = getattr(_submodule(known, parent), last)
    return known[name]


@torch.compiler.assume_constant_result
def _ranks(*tables: Tensor) -> list[int]:
    """For L scales and L zero points, ``[G]`` or ``[1]`` each, a number for each of the L: equal ones have the same.

    Layers that share an input (query, key, value) mostly have the same ranges. Where they take them from one place, a
    compiler sees that their codes are the same. That is a constant of the graph, and its calls check it.
    """
    half, most = len(tables) // 2, max(len(table) for table in tables)
    columns = [tuple(table.expand(most).tolist()) for table in tables]
    known: dict[tuple[Any, ...], int] = {}
    return [known.setdefault(pair, len(known)) for pair in zip(columns[:half], columns[half:], strict=True)]


def _groups(module: Any) -> str:
    return module.groups if isinstance(module, ActivationQuantizer) else module.group_name


def _table(module: Any) -> tuple[Tensor, Tensor] | None:
    """Scale and zero point of every group, ``[G]``: of an operand of an attention, or of an integer layer."""
    if isinstance(module, ActivationQuantizer):
        return module.scale, module.zero_point
    scale, zero_point = getattr(module, "act_scale", None), getattr(module, "act_zero_point", None)
    return None if scale is None or zero_point is None else (scale, zero_point)
