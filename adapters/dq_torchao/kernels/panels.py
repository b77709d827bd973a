"""The right operand of the products of ours (`dq_torchao.kernels.product`): weight codes in panels, see product.h.

Shapes: codes ``[O, C, *kernel]``; as a matrix ``[T, C]`` by ``[O]``, T the taps of the kernel and C padded to fours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

COLUMNS, LANES, WORD = 64, 16, 4
"""Outputs of a panel, of a register, and inputs that lie side by side."""


class Panels(NamedTuple):
    """A weight laid out.

    Attributes:
        panels: int8, one after the other.
        sums: int32 ``[O]``, of every output's codes.
        shape: of the codes; several views of one weight may be laid out (`dq_torchao.planes`).
    """

    panels: Tensor
    sums: Tensor
    shape: tuple[int, ...]


def panels(codes: Tensor) -> Tensor:
    """The codes laid out.

    Args:
        codes: int8 ``[O, C, *kernel]``.

    Returns:
        int8, one dimension.
    """
    outputs, channels = codes.shape[:2]
    rows = codes.reshape(outputs, channels, -1).mT  # [O, T, C]
    rows = F.pad(rows, (0, -channels % WORD)).flatten(1)  # [O, K]
    return torch.cat([_panel(rows[first : first + width], size) for first, width, size in _slices(outputs)])


def plain(laid_out: Tensor, shape: Sequence[int]) -> Tensor:
    """The codes of `panels`, as they were: int8 of ``shape``."""
    outputs, channels, *kernel = shape
    taps, padded = prod(kernel), channels + -channels % WORD
    parts, start = [], 0
    for _, width, size in _slices(outputs):
        count = taps * padded * size
        words = laid_out[start : start + count].reshape(-1, size, WORD)
        parts.append(words.transpose(0, 1).reshape(size, taps, padded)[:width, :, :channels])
        start += count
    return torch.cat(parts).mT.reshape(tuple(shape)).contiguous()


def _panel(rows: Tensor, size: int) -> Tensor:
    rows = F.pad(rows, (0, 0, 0, size - len(rows)))
    return rows.reshape(size, -1, WORD).transpose(0, 1).flatten()


def _slices(outputs: int) -> Iterator[tuple[int, int, int]]:
    """First output of each panel, their number, and that with padding."""
    for first in range(0, outputs, COLUMNS):
        width = min(COLUMNS, outputs - first)
        yield first, width, width + -width % LANES
