"""The range that clips a given share of the values."""

from __future__ import annotations

import torch
from torch import Tensor

from dq_plugins.errors import DQError
from dq_plugins.observers.distribution import BINS, DistributionObserver


class PercentileObserver(DistributionObserver):
    """Clips ``100 - percentile`` percent of the values.

    Symmetric: that share of the largest absolute values. Asymmetric: half of it at each end.

    Args:
        percentile: above 50, up to 100; 100 is min-max.
    """

    name = "percentile"

    def __init__(self, bits: int = 8, symmetric: bool = True, *, percentile: float = 99.99, bins: int = BINS) -> None:
        super().__init__(bits, symmetric, bins=bins)
        if not 50 < percentile <= 100:
            raise DQError(f"percentile must lie above 50 and at most at 100, got {percentile!r}")
        self.percentile = float(percentile)

    def range_of(self, values: Tensor, weights: Tensor) -> tuple[float, float]:
        """Ends of the share that is kept, to within one bin of the histogram."""
        if self.percentile == 100:
            return self.low, self.high
        clipped = 1 - self.percentile / 100
        if self.symmetric:
            bound = -_lower_quantile(-values.abs(), weights, clipped)
            return -bound, bound
        low = _lower_quantile(values, weights, clipped / 2)
        return low, -_lower_quantile(-values, weights, clipped / 2)


def _lower_quantile(values: Tensor, weights: Tensor, share: float) -> float:
    values, order = values.sort()
    below = weights[order].cumsum(0) / weights.sum()  # [N], share of the weight up to each value
    index = int(torch.searchsorted(below, torch.tensor(share, dtype=below.dtype), right=True))
    return float(values[min(index, values.numel() - 1)])
