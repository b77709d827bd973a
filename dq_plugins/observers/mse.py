"""The range with the least squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from dq_plugins.affine import affine_parameters, integer_range
from dq_plugins.observers.candidate_ranges import RATIO, candidate_ranges
from dq_plugins.observers.distribution import DistributionObserver
from dq_plugins.observers.error import range_errors
from dq_plugins.observers.exact_ranges import exact_range

CHEAP = 1 << 20  # values x levels x zero points that are swept in about a tenth of a second


class MSEObserver(DistributionObserver):
    """Minimises the mean squared error.

    Symmetric ranges, and asymmetric ones of few bits, are found exactly: no scale and no zero point does better on
    the values in the histogram. Where that would be slow (asymmetric, more than 4 bits), the best of a grid is
    improved exactly around its scale and zero point.
    """

    name = "mse"

    def range_of(self, values: Tensor, weights: Tensor) -> tuple[float, float]:
        """The range with the least mean squared error."""
        levels = 2**self.bits
        sweeps = values.numel() * (levels // 2 if self.symmetric else levels * levels)
        if sweeps <= CHEAP:
            return exact_range(values, weights, self.bits, symmetric=self.symmetric)
        return self._near_best_of_grid(values, weights)

    def _near_best_of_grid(self, values: Tensor, weights: Tensor) -> tuple[float, float]:
        ends = torch.tensor([[self.low], [self.high]])
        low, high = candidate_ranges(ends[0], ends[1], symmetric=self.symmetric)
        errors = range_errors(values, weights, low, high, self.bits, symmetric=self.symmetric)
        best = errors.argmin()
        scale, zero = affine_parameters(low[best], high[best], self.bits, symmetric=self.symmetric)
        q_min, q_max = integer_range(self.bits)
        reach = max(1, (q_max - q_min) // 64)
        zeros = range(max(q_min, int(zero) - reach), min(q_max, int(zero) + reach) + 1)
        scales = (float(scale) / RATIO**2, float(scale) * RATIO**2)
        return exact_range(values, weights, self.bits, symmetric=self.symmetric, zeros=zeros, scales=scales)
