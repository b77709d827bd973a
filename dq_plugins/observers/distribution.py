"""Base of the observers that need the distribution of the values, not only its ends."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor
from typing_extensions import Self

from dq_plugins.observers.histogram import Histogram
from dq_plugins.observers.observer import Observer

BINS = 4096


class DistributionObserver(Observer):
    """Keeps a histogram and chooses the range from weighted values.

    Args:
        bits: width of the quantizer.
        symmetric: whether its zero point is fixed at 0.
        bins: resolution; memory is at most ``16 * bins`` bytes. More bins than 8 for each level of the quantizer
            change errors by well below one percent.
    """

    def __init__(self, bits: int = 8, symmetric: bool = True, *, bins: int = BINS) -> None:
        super().__init__(bits, symmetric)
        self.histogram = Histogram(bins)

    def observe(self, values: Tensor) -> None:
        """Add the values to the histogram."""
        self.histogram.update(values, *(float(v) for v in values.aminmax()))

    def absorb(self, other: Self) -> None:
        """Add the other's histogram."""
        self.histogram.merge(other.histogram)

    def take(self, seen: Observer, histogram: Histogram) -> None:
        """Take in what another kind of observer saw and kept in a histogram."""
        self.count += seen.count
        self.low, self.high = min(self.low, seen.low), max(self.high, seen.high)
        self.histogram.merge(histogram)

    def choose_range(self) -> tuple[float, float]:
        """The range for the values in the histogram."""
        return self.range_of(*self.histogram.points())

    @abstractmethod
    def range_of(self, values: Tensor, weights: Tensor) -> tuple[float, float]:
        """The range for weighted values.

        Args:
            values: ascending, float32 ``[N]``.
            weights: how often each occurs, float64 ``[N]``.
        """
