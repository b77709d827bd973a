"""What is kept of the inputs of one layer at one timestep, in memory and on disk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dq_plugins.artifact import STRICT, Format, StoredTensor
from dq_plugins.errors import CalibrationError
from dq_plugins.observers.distribution import BINS
from dq_plugins.observers.histogram import INDEX_BITS, MIN_EXPONENT, Histogram
from dq_plugins.observers.observer import Observer


@dataclass(frozen=True)
class LayerRecord:
    """What a file holds of the inputs of one layer at one timestep.

    Attributes:
        count: of values.
        low: the smallest.
        high: the largest.
        squares: sum of their squares.
        exponent: of the histogram's bins, see `Histogram`, as the rest.
        first: index of the first bin.
        counts: int64 ``[n]``.
        sums: float64 ``[n]``.
    """

    __pydantic_config__ = STRICT

    count: int
    low: float
    high: float
    squares: float
    exponent: int
    first: int
    counts: StoredTensor
    sums: StoredTensor

    def __post_init__(self) -> None:
        fits = self.counts.dim() == 1 and self.counts.shape == self.sums.shape and self.count >= 1
        if not fits or (self.counts.dtype, self.sums.dtype) != (torch.int64, torch.float64):
            raise ValueError("a histogram has a count (int64) and a sum (float64) for each of its bins")
        lattice = MIN_EXPONENT <= self.exponent <= 128 and abs(self.first) <= 2 << INDEX_BITS
        if not lattice or int(self.counts.min()) < 0 or not bool(torch.isfinite(self.sums).all()):
            raise ValueError("a histogram has counts from 0 and finite sums, in bins that float32 can number")


SAMPLE = 1 << 17
"""Values of a layer's input that enter the histogram, at least, for each call; its ends are those of all values."""

PIECE = 1 << 14
"""Values that one thread squares and adds up in float32, whatever the number of threads."""

TIMESTEP: Format[dict[str, LayerRecord]] = Format(
    "statistics", 2, dict[str, LayerRecord], CalibrationError, "statistics of a timestep"
)


def _squares(values: Tensor) -> float:
    """Sum of squares of float32 values ``[n]``: float32 in pieces, whose sums are added in float64."""
    pieces = sum(float(piece.dot(piece)) for piece in values.split(PIECE))
    # too large, or so small that their squares are not normal numbers: several times as slow
    return pieces if 1e-30 < pieces < 1e38 else float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


class InputStatistics(Observer):
    """Everything that is kept about one layer's inputs at one timestep."""

    name = "statistics"

    def __init__(self, bins: int = BINS) -> None:
        super().__init__(symmetric=False)
        self.histogram = Histogram(bins)
        self.squares = 0.0

    def observe(self, values: Tensor) -> None:
        """Add the values to the histogram and to the sum of squares."""
        self.squares += _squares(values)
        # an odd step meets all channels and positions, whose numbers are mostly even
        some = values[:: 2 * (len(values) // (2 * SAMPLE)) + 1]
        self.histogram.update(some, *(float(v) for v in some.aminmax()))

    def absorb(self, other: InputStatistics) -> None:
        """Add the other's histogram and sum of squares."""
        self.histogram.merge(other.histogram)
        self.squares += other.squares

    def choose_range(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return self.low, self.high

    @property
    def record(self) -> LayerRecord:
        """Everything, to be written."""
        h = self.histogram
        return LayerRecord(self.count, self.low, self.high, self.squares, h.exponent, h.first, h.counts, h.sums)

    @classmethod
    def of(cls, record: LayerRecord, bins: int = BINS) -> InputStatistics:
        """What `record` gave; the record's tensors may lie in a file."""
        found = cls(bins)
        found.count, found.low, found.high, found.squares = record.count, record.low, record.high, record.squares
        h = found.histogram
        h.exponent, h.first = record.exponent, record.first
        h.counts, h.sums = record.counts.clone(), record.sums.clone()
        return found
