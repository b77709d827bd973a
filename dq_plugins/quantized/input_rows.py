"""The input of a layer as rows that multiply its weight matrix, a random sample of them.

A linear layer multiplies each of its input's vectors by its weight. A convolution does the same with the patch under
each output position; with groups, each group of output channels sees its own slice of the patch.

Shapes: ``N`` batch, ``C`` input channels, ``O`` output channels, ``P`` groups of channels, ``K`` products per output,
``R`` sampled rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dq_plugins.layer_kinds import kind_of


def has_rows(layer: nn.Module) -> bool:
    """Whether `input_rows` knows the layer: it multiplies, and dimension 0 of its weight belongs to outputs."""
    kind = kind_of(layer)
    return kind is not None and not kind.lookup and kind.output_axis == 0


def weight_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight ``[O, C/P, ...]`` of the layer as matrices ``[P, O/P, K]``, in the order of `input_rows`."""
    groups = getattr(layer, "groups", 1)
    return weight.flatten(1).reshape(groups, weight.shape[0] // groups, -1)


def input_rows(layer: nn.Module, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most ``count`` rows of ``x``, drawn without replacement.

    Args:
        layer: a layer for which `has_rows` holds.
        x: its input, ``[..., K]`` for a linear layer, ``[N, C, ...]`` or ``[C, ...]`` for a convolution.
        count: rows wanted.
        generator: of the draw.

    Returns:
        float32 ``[P, R, K]``: ``rows[p] @ weight_matrix(...)[p].T`` are outputs of the layer, without its bias.
    """
    kind: Any = kind_of(layer)
    if kind.spatial == 0:
        rows = x.reshape(-1, x.shape[-1])  # [N, K]
        return rows[_drawn(len(rows), count, generator)].float()[None]
    convolution: Any = layer
    x = x if x.dim() == kind.spatial + 2 else x[None]
    patches = _padded(convolution, x)
    for axis in range(kind.spatial):
        reach = convolution.dilation[axis] * (convolution.kernel_size[axis] - 1) + 1
        patches = patches.unfold(2 + axis, reach, convolution.stride[axis])  # a view, [N, C, *positions, *reach]
    positions = patches.shape[2 : 2 + kind.spatial]
    drawn = _drawn(x.shape[0] * positions.numel(), count, generator)
    sample, *place = torch.unravel_index(drawn, (x.shape[0], *positions))
    steps = tuple(slice(None, None, d) for d in convolution.dilation)
    rows = patches[(sample, slice(None), *place)][(..., *steps)]  # [R, C, *kernel]
    return rows.reshape(len(rows), convolution.groups, -1).transpose(0, 1).float()


def _drawn(total: int, count: int, generator: torch.Generator) -> Tensor:
    if total <= count:
        return torch.arange(total)
    return torch.randperm(total, generator=generator)[:count].sort().values


def _padded(convolution: Any, x: Tensor) -> Tensor:
    border = convolution._reversed_padding_repeated_twice  # what nn.Conv itself hands to F.pad, "same" included
    mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
    return F.pad(x, border, mode=mode)
