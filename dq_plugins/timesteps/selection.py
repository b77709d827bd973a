"""What one call of the denoiser selects, and how entries of a table meet the tensors of a layer.

Shapes: ``G`` groups; ``B`` samples and ``T`` tokens of a call. An index is ``[1]`` (one timestep for the whole call),
``[B]`` (one per sample) or ``[B, T]`` (one per token).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

import torch
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


INDICES = "_indices"
"""What an argument is called after the timestep's where the timestep lists distinct values, and it says which of them
each of the packed tokens has."""


def unpacked(timestep: Tensor, indices: Any) -> Tensor:
    """Distinct timesteps as one per token, ``[1, T]`` or ``[B, T]``; as it is, without indices.

    Example:
        >>> import torch
        >>> unpacked(torch.tensor([0.7, 0.3]), torch.tensor([0, 0, 1]))
        tensor([[0.7000, 0.7000, 0.3000]])
    """
    if not isinstance(indices, Tensor) or indices.is_floating_point() or timestep.dim() != 1:
        return timestep
    return timestep[indices.to(timestep.device)].reshape(-1, indices.shape[-1])


def by_sample_or_token(timestep: Tensor) -> Tensor:
    """A timestep of any shape as ``[1]``, ``[B]``, or ``[B, T]``: one per token, or per frame.

    Example:
        >>> import torch
        >>> by_sample_or_token(torch.zeros(2, 1, 5, 1, 1)).shape, by_sample_or_token(torch.zeros(2, 1)).shape
        (torch.Size([2, 5]), torch.Size([2]))
    """
    if timestep.dim() < 2 or timestep.numel() == len(timestep):
        return timestep.reshape(-1)
    return timestep.reshape(len(timestep), -1)


RowOrder = Literal["first", "second", "fastest", "mixed"]
"""Where the B samples of a call are in a layer's input ``x``:

- ``first``: dimension 0 has B entries, or k B, of which k that follow each other belong to one sample;
- ``second``: dimension 1 has B entries: ``[S, B, ..., C]``;
- ``fastest``: dimension 0 has k B entries, of which every B-th belongs to one sample;
- ``mixed``: nothing of the kind.
"""

NO_ORDER = (
    "the samples of this batch have different timesteps, and it is not known which rows of the input of a layer belong "
    "to which sample ({}). Call the denoiser with one timestep for the whole batch"
)


def fit_to_input(index: Tensor, x: Tensor, spatial: int = 0, rows: RowOrder | None = None) -> Tensor:
    """The index of every sample or token, in the leading dimensions of a layer's input.

    A layer may see other rows than the tokens that have timesteps: the text, a whole image, tokens and text in one
    sequence. One range then holds for all that it sees of a sample, and it is that of the largest timestep: the one
    that is being denoised, where others are given clean.

    Args:
        index: ``[B]``, ``[B, T]``, or ``[1, T]`` for all samples: groups, or the timesteps themselves.
        x: ``[N, ...]``, of the samples in the order that ``rows`` says. With one timestep per token or frame it has T
            or k T tokens of each sample, in that order, where the order of samples has a place for them.
        spatial: dimensions that a kernel slides over: the second dimension of ``x`` then holds channels.
        rows: where samples are; None: not known, and where the shape of ``x`` leaves that open, the index has to be
            the same for all. Shapes leave it open where N is not B, or ``x`` is ``[B, B, C]``.

    Returns:
        ``[N]``, ``[S, B]`` or ``[B, k T]``.

    Raises:
        TimestepError: ``x`` does not have these samples, or the shape leaves it open which rows are whose. In a
            compiled graph, and on an accelerator, the device asserts it.
    """
    open_order = rows is None or (rows == "mixed" and len(index) == 1)  # of one sample nothing hangs on it
    order = _by_shape(index, x, spatial) if open_order else rows
    if index.dim() == 2 and len(index) == 1 and x.dim() == 3 and not spatial:
        index = index.expand(x.shape[1] if order == "second" else x.shape[0], -1)  # the same for all samples
    samples = len(index)
    if order == "first" and x.shape[0] % samples == 0:
        return _samples_first(index, x, spatial)
    if order == "second" and x.dim() > 2 and x.shape[1] == samples:
        return _sequence_first(index, x.shape[0])
    if order == "fastest" and x.shape[0] % samples == 0:
        return _sequence_first(index, x.shape[0] // samples).reshape(-1)
    if _same_in_all(index) and not _has_tokens(index, x, spatial):
        index = index.amax(1)
    return _same_for_all(index, x, rows)


def _readable(index: Tensor) -> bool:
    return index.device.type == "cpu" and not torch.compiler.is_compiling()


def _same_in_all(index: Tensor) -> bool:
    """Whether tokens are known to have the same index in all samples."""
    return index.dim() == 2 and (len(index) == 1 or (_readable(index) and bool((index == index[:1]).all())))


def _has_tokens(index: Tensor, x: Tensor, spatial: int) -> bool:
    """Whether rows of ``x`` may be single tokens."""
    lengths = x.shape[:2] if x.dim() == 3 and not spatial else ()
    return x.shape[0] % index.numel() == 0 or any(length % index.shape[1] == 0 for length in lengths)


def _by_shape(index: Tensor, x: Tensor, spatial: int) -> RowOrder:
    """The only order of samples that a shape allows; ``mixed`` where it leaves that open."""
    samples, sequence = len(index), x.dim() == 3 and not spatial
    if sequence and _same_in_all(index):  # then it is left open only which dimension has the tokens
        second = samples in (1, x.shape[1]) and x.shape[0] % index.shape[1] == 0
        if second and (x.shape[1] == 1 or samples not in (1, x.shape[0])):
            return "second"
        return "first" if samples in (1, x.shape[0]) and (not second or x.shape[0] == 1) else "mixed"
    sequence = sequence and x.shape[1] == samples
    if samples == 1 or (x.shape[0] == samples and not sequence):
        return "first"
    return "second" if sequence and x.shape[0] % samples else "mixed"


def _samples_first(index: Tensor, x: Tensor, spatial: int) -> Tensor:
    samples, each = index.shape[0], x.shape[0] // index.shape[0]
    if index.dim() == 2:
        tokens = index.shape[1]
        if x.dim() == 3 and not spatial and each == 1 and x.shape[1] % tokens == 0:
            return index.repeat_interleave(x.shape[1] // tokens, 1)
        if x.shape[0] % (samples * tokens) == 0:
            return index.reshape(-1).repeat_interleave(x.shape[0] // (samples * tokens), 0)
        index = index.amax(1)
    return index.repeat_interleave(each, 0)


def _sequence_first(index: Tensor, length: int) -> Tensor:
    """``[S, B]``, of S rows in a sequence for each sample."""
    if index.dim() == 2 and length % index.shape[1] == 0:
        return index.t().repeat_interleave(length // index.shape[1], 0)
    return (index if index.dim() == 1 else index.amax(1)).expand(length, -1)


def _same_for_all(index: Tensor, x: Tensor, rows: RowOrder | None) -> Tensor:
    """``[N]``, of an index that is the same for all samples and tokens."""
    fault = NO_ORDER.format(f"shape {tuple(x.shape)}, {len(index)} timesteps, order {rows or 'not known'}")
    values = index.reshape(-1)
    if not _readable(index):
        torch._assert_async((values == values[0]).all(), fault)
    elif not bool((values == values[0]).all()):
        raise TimestepError(fault)
    return values[:1].expand(x.shape[0])


def select_for_input(table: Tensor, index: Tensor, x: Tensor, spatial: int = 0, rows: RowOrder | None = None) -> Tensor:
    """Entries of ``table`` for the samples or tokens of ``x``, shaped to broadcast against it.

    Args:
        table: ``[G]``.
        index: ``[1]``, ``[B]`` or ``[B, T]``.
        x: a layer's input, see `fit_to_input`.
        spatial: see `fit_to_input`.
        rows: likewise.

    Returns:
        ``[]`` for one timestep or one group, else ``[N, 1, ..., 1]``, ``[S, B, 1]`` or ``[B, T, 1, ..., 1]``.

    Raises:
        TimestepError: ``x`` does not have these samples.
    """
    if table.shape[0] == 1:
        return table.reshape(())
    if index.numel() == 1:
        return table.index_select(0, index.reshape(-1)).reshape(())
    fitted = fit_to_input(index, x, spatial, rows)
    selected = table.index_select(0, fitted.reshape(-1))
    return selected.reshape(*fitted.shape, *[1] * (x.dim() - fitted.dim()))
