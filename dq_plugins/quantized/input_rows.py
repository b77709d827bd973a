"""The input of a layer as rows that multiply its weight matrix, a random sample of them.

A linear layer multiplies each of its input's vectors by its weight. A convolution does the same with the patch under
each output position; with groups, each group of output channels sees its own slice of the patch.

Shapes: ``N`` batch, ``C`` input channels, ``O`` output channels, ``P`` groups of channels, ``K`` products per output,
``R`` sampled rows.
"""

from __future__ import annotations

from math import prod
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


def seen_and_held_out(x: Tensor, *, batched: bool) -> tuple[Tensor, Tensor]:
    """Samples of an input that something is chosen by, and others that judge it; the same where there is one alone.

    Every second one, so that both rows of a guided image are on one side (of an even number of images).
    """
    return (x[::2], x[1::2]) if batched and len(x) > 1 else (x, x)


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
    axes = range(kind.spatial)
    border = convolution._reversed_padding_repeated_twice  # what nn.Conv itself hands to F.pad, "same" included
    if convolution.padding_mode != "zeros":
        x, border = F.pad(x, border, mode=convolution.padding_mode), [0] * len(border)
    before = [border[2 * (kind.spatial - 1 - axis)] for axis in axes]
    after = [border[2 * (kind.spatial - 1 - axis) + 1] for axis in axes]
    reach = [convolution.dilation[axis] * (convolution.kernel_size[axis] - 1) + 1 for axis in axes]
    spans = [x.shape[2 + axis] + before[axis] + after[axis] - reach[axis] for axis in axes]
    positions = [span // stride + 1 for span, stride in zip(spans, convolution.stride, strict=True)]
    drawn = _drawn(x.shape[0] * prod(positions), count, generator)
    sample, *place = torch.unravel_index(drawn, (x.shape[0], *positions))
    outside, where = torch.zeros((), dtype=torch.bool), []
    for axis in axes:
        taps = torch.arange(convolution.kernel_size[axis]) * convolution.dilation[axis] - before[axis]
        index = _along(place[axis] * convolution.stride[axis], 0, kind.spatial) + _along(taps, 1 + axis, kind.spatial)
        outside = outside | (index < 0) | (index >= x.shape[2 + axis])
        where.append(index.clamp(0, x.shape[2 + axis] - 1))
    # only the patches are padded, not all of the input: [R, *kernel, C]
    rows = x.movedim(1, -1)[(_along(sample, 0, kind.spatial), *where)]
    rows = rows.masked_fill(outside[..., None].to(x.device), 0)
    rows = rows.movedim(-1, 1)  # [R, C, *kernel]
    return rows.reshape(len(rows), convolution.groups, -1).transpose(0, 1).float()


def _along(index: Tensor, axis: int, spatial: int) -> Tensor:
    """``[n]`` along one of the axes of patches, ``[R, *kernel]``."""
    return index.reshape([-1 if axis == each else 1 for each in range(1 + spatial)])


def _drawn(total: int, count: int, generator: torch.Generator) -> Tensor:
    if total <= count:
        return torch.arange(total)
    return torch.randperm(total, generator=generator)[:count].sort().values
