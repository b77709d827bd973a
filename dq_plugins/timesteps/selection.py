"""What one call of the denoiser selects, and how entries of a table meet the tensors of a layer.

Shapes: ``G`` groups; ``B`` samples and ``T`` tokens of a call. An index is ``[1]`` (one timestep for the whole call),
``[B]`` (one per sample) or ``[B, T]`` (one per token).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from torch import Tensor, nn

from dq_plugins.errors import TimestepError


class Selection(NamedTuple):
    """The selection of one call.

    Attributes:
        timestep: of the call: ``[1]``, ``[B]`` or ``[B, T]``.
        index: selected group by name of the set of groups, in the shape of ``timestep``.
        traced: whether the selection is part of a graph that is being compiled, with the layers that read it.
        per_call: what layers computed from the timestep for others to use during the same call.
        denoiser: whose call it is; None for layers called without it.
    """

    timestep: Tensor
    index: dict[str, Tensor]
    traced: bool
    per_call: dict[Hashable, Any]
    denoiser: nn.Module | None = None


def fewest_entries(values: Tensor) -> Tensor:
    """``values`` ``[1]``, ``[B]`` or ``[B, T]``, without the dimensions over which they are all the same.

    It looks at the values, so it is for eager code on the host.

    Example:
        >>> import torch
        >>> fewest_entries(torch.tensor([[5, 5], [7, 7]]))
        tensor([5, 7])
        >>> fewest_entries(torch.tensor([5, 5, 5]))
        tensor([5])
    """
    if values.numel() == 1:
        return values.reshape(1)
    if values.dim() > 1 and bool((values == values[:, :1]).all()):
        values = values[:, 0]
    if values.dim() == 1 and bool((values == values[:1]).all()):
        values = values[:1]
    return values


def fit_to_input(selected: Tensor, per: tuple[int, ...], x: Tensor) -> Tensor:
    """What was selected for every sample or token, in the leading dimensions of a layer's input.

    Args:
        selected: ``[*per, *F]``.
        per: shape of the index: ``[B]`` or ``[B, T]``.
        x: ``[N, ...]``. N is a multiple of B: where a layer folded frames or tokens into the batch, consecutive rows
            belong to one sample. ``[S, B, C]`` with S other than B is read as a sequence of batches, as layers of some
            transformers see it. With one timestep per token it is ``[B, T, ...]``, or ``[B T, ...]`` after folding.

    Returns:
        ``[N, *F]``, ``[S, B, *F]`` or ``[B, T, *F]``.

    Raises:
        TimestepError: ``x`` does not have these samples or tokens.
    """
    entry = selected.shape[len(per) :]
    if len(per) == 2:
        if x.dim() == 3 and tuple(x.shape[:2]) == per:
            return selected
        if x.shape[0] == per[0] * per[1]:
            return selected.reshape(x.shape[0], *entry)
        raise TimestepError(
            f"this call has one timestep for each of {per[1]} tokens of {per[0]} samples, and a layer sees an input of "
            f"shape {tuple(x.shape)}, whose rows are not these tokens: which timestep a row belongs to is not known. "
            "Call the denoiser with one timestep per sample"
        )
    if x.dim() == 3 and x.shape[0] != per[0] == x.shape[1]:
        return selected.expand(x.shape[0], *selected.shape)
    if x.shape[0] % per[0]:
        raise TimestepError(
            f"a layer sees a batch of {x.shape[0]}, which is not a multiple of the {per[0]} timesteps of this "
            "call; call the denoiser with one timestep for the whole batch"
        )
    return selected.repeat_interleave(x.shape[0] // per[0], 0)


def select_for_input(table: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """Entries of ``table`` for the samples or tokens of ``x``, shaped to broadcast against it.

    Args:
        table: ``[G]``.
        index: ``[1]``, ``[B]`` or ``[B, T]``.
        x: a layer's input, see `fit_to_input`.

    Returns:
        ``[]`` for one timestep or one group, else ``[N, 1, ..., 1]``, ``[S, B, 1]`` or ``[B, T, 1, ..., 1]``.

    Raises:
        TimestepError: ``x`` does not have these samples or tokens.
    """
    if table.shape[0] == 1:
        return table.reshape(())
    selected = table.index_select(0, index.reshape(-1))
    if index.numel() == 1:
        return selected.reshape(())
    fitted = fit_to_input(selected.reshape(index.shape), tuple(index.shape), x)
    return fitted.reshape(*fitted.shape, *[1] * (x.dim() - fitted.dim()))
