"""A distribution in bounded memory: counts and sums of values in bins of a fixed lattice.

Bin ``i`` is ``[i, i + 1) * 2^e``. The exponent e is the smallest for which the values seen so far span at most
``bins`` bins. Coarser bins are unions of finer ones and scaling by a power of two is exact, so the histogram is a
function of the values alone: batches, their order and merging do not matter.

Shapes: ``n`` bins in use.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_EXPONENT = -100  # the smallest bin; what lies below is as good as zero
INDEX_BITS = 24  # bin indices stay integers that float32 holds exactly


class Histogram:
    """Counts and sums per bin.

    Args:
        bins: the largest number of bins; at least half of them cover the range that was seen.

    Attributes:
        exponent: e above.
        first: index of the first bin in use.
        counts: int64 ``[n]``.
        sums: float64 ``[n]``.
    """

    def __init__(self, bins: int = 4096) -> None:
        self.bins = bins
        self.exponent = MIN_EXPONENT
        self.first = 0
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.sums = torch.zeros(0, dtype=torch.float64)

    def update(self, values: Tensor, low: float, high: float) -> None:
        """Add float32 values, in one dimension, that lie in ``[low, high]``."""
        exponent = self._exponent_for(low, high)
        first, size = self._extent(exponent, low, high)
        index = (values * 2.0**-exponent).floor_().sub_(first).to(torch.int64)  # the bin of each value
        counts = torch.bincount(index, minlength=size).cpu()  # [size], as sums below
        sums = torch.bincount(index, weights=values.double(), minlength=size).cpu()
        self._coarsen(exponent)
        self._add(first, counts, sums)

    def merge(self, other: Histogram) -> None:
        """Add everything that ``other`` holds."""
        if not other.counts.numel():
            return
        width = 2.0**other.exponent
        low, high = other.first * width, (other.first + other.counts.numel() - 1) * width
        self._coarsen(max(self._exponent_for(low, high), other.exponent))
        first, counts, sums = other.first, other.counts, other.sums
        for _ in range(self.exponent - other.exponent):
            first, counts, sums = _halve(first, counts, sums)
        self._add(first, counts, sums)

    def points(self) -> tuple[Tensor, Tensor]:
        """Mean value (float32) and count (float64) of every bin that is not empty, by ascending value."""
        kept = self.counts > 0
        counts = self.counts[kept].double()
        return (self.sums[kept] / counts).float(), counts

    def _exponent_for(self, low: float, high: float) -> int:
        """The exponent after values in ``[low, high]`` join what is here."""
        if self.counts.numel():
            width = 2.0**self.exponent
            low = min(low, self.first * width)
            high = max(high, (self.first + self.counts.numel() - 1) * width)
        magnitude = max(abs(low), abs(high))
        exponent = self.exponent
        if magnitude > 0:
            exponent = max(exponent, math.frexp(magnitude)[1] - INDEX_BITS)
        while self._extent(exponent, low, high)[1] > self.bins:
            exponent += 1
        return exponent

    @staticmethod
    def _extent(exponent: int, low: float, high: float) -> tuple[int, int]:
        first = math.floor(low * 2.0**-exponent)
        return first, math.floor(high * 2.0**-exponent) - first + 1

    def _coarsen(self, exponent: int) -> None:
        while self.exponent < exponent:
            if not self.counts.numel():
                self.exponent = exponent
                return
            self.first, self.counts, self.sums = _halve(self.first, self.counts, self.sums)
            self.exponent += 1

    def _add(self, first: int, counts: Tensor, sums: Tensor) -> None:
        if not self.counts.numel():
            self.first, self.counts, self.sums = first, counts, sums
            return
        start = min(self.first, first)
        size = max(self.first + self.counts.numel(), first + counts.numel()) - start
        all_counts = torch.zeros(size, dtype=torch.int64)
        all_sums = torch.zeros(size, dtype=torch.float64)
        for offset, c, s in ((self.first - start, self.counts, self.sums), (first - start, counts, sums)):
            all_counts[offset : offset + c.numel()] += c
            all_sums[offset : offset + s.numel()] += s
        self.first, self.counts, self.sums = start, all_counts, all_sums


def _halve(first: int, counts: Tensor, sums: Tensor) -> tuple[int, Tensor, Tensor]:
    start = first // 2  # bin i becomes part of bin floor(i / 2)
    lead = first - 2 * start
    tail = (lead + counts.numel()) % 2

    def pairs(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (lead, tail)).reshape(-1, 2).sum(1)

    return start, pairs(counts), pairs(sums)
