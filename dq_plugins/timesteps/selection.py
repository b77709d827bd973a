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


def fit_to_input(index: Tensor, x: Tensor, spatial: int = 0) -> Tensor:
    """The index of every sample or token, in the leading dimensions of a layer's input.

    A layer may see other rows than the tokens that have timesteps: the text, a whole image, tokens and text in one
    sequence. One range then holds for all that it sees of a sample, and it is that of the largest timestep: the one
    that is being denoised, where others are given clean.

    Args:
        index: ``[B]``, ``[B, T]``, or ``[1, T]`` for all samples: groups, or the timesteps themselves.
        x: ``[N, ...]``. N is a multiple of B: where a layer folded frames or tokens into the batch, consecutive rows
            belong to one sample. ``[S, B, C]`` with S other than B is read as a sequence of batches, as layers of some
            transformers see it. With one timestep per token or frame it is ``[B, T, C]``, ``[B, k T, C]`` where each
            frame has k tokens, ``[T, B, C]``, or ``[k B T, ...]`` after folding.
        spatial: dimensions that a kernel slides over: the second dimension of ``x`` then holds channels.

    Returns:
        ``[N]``, ``[S, B]`` or ``[B, k T]``.

    Raises:
        TimestepError: ``x`` does not have these samples.
    """
    if index.dim() == 2:
        if x.dim() == 3 and not spatial and index.shape[0] == 1:
            index = index.expand(x.shape[0], -1)  # of packed tokens, the same for all samples
        samples, tokens = index.shape
        if x.dim() == 3 and not spatial:
            if x.shape[0] == samples and x.shape[1] % tokens == 0:
                return index.repeat_interleave(x.shape[1] // tokens, 1)
            if tuple(x.shape[:2]) == (tokens, samples):
                return index.t()
        if x.shape[0] % (samples * tokens) == 0:
            return index.reshape(-1).repeat_interleave(x.shape[0] // (samples * tokens), 0)
        index = index.amax(1)
    samples = index.shape[0]
    if x.dim() == 3 and not spatial and x.shape[0] != samples == x.shape[1]:
        return index.expand(x.shape[0], samples)
    if x.shape[0] % samples:
        raise TimestepError(
            f"a layer sees a batch of {x.shape[0]}, which is not a multiple of the {samples} timesteps of this "
            "call; call the denoiser with one timestep for the whole batch"
        )
    return index.repeat_interleave(x.shape[0] // samples, 0)


def select_for_input(table: Tensor, index: Tensor, x: Tensor, spatial: int = 0) -> Tensor:
    """Entries of ``table`` for the samples or tokens of ``x``, shaped to broadcast against it.

    Args:
        table: ``[G]``.
        index: ``[1]``, ``[B]`` or ``[B, T]``.
        x: a layer's input, see `fit_to_input`.
        spatial: see `fit_to_input`.

    Returns:
        ``[]`` for one timestep or one group, else ``[N, 1, ..., 1]``, ``[S, B, 1]`` or ``[B, T, 1, ..., 1]``.

    Raises:
        TimestepError: ``x`` does not have these samples.
    """
    if table.shape[0] == 1:
        return table.reshape(())
    if index.numel() == 1:
        return table.index_select(0, index.reshape(-1)).reshape(())
    fitted = fit_to_input(index, x, spatial)
    selected = table.index_select(0, fitted.reshape(-1))
    return selected.reshape(*fitted.shape, *[1] * (x.dim() - fitted.dim()))
