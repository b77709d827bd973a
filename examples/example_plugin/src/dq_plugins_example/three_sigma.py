"""An observer that clips at a number of standard deviations.

Mean and variance stream: batches are joined by the parallel update of Chan, Golub and LeVeque, "Updating formulae and
a pairwise algorithm for computing sample variances" (1979), which loses no digits when the mean is large.

Shapes: a batch is ``[n]``.
"""

from __future__ import annotations

import math

from torch import Tensor
from typing_extensions import Self

from dq_plugins.errors import DQError
from dq_plugins.observers import Observer


class ThreeSigma(Observer):
    """Clip to ``mean +- sigmas * standard deviation``, and never beyond what was seen.

    Args:
        bits: width of the quantizer.
        symmetric: whether its zero point is fixed at 0.
        sigmas: half the width of the range, in standard deviations.

    Raises:
        DQError: ``sigmas`` is not positive.
    """

    name = "three-sigma"

    def __init__(self, bits: int = 8, symmetric: bool = True, *, sigmas: float = 3.0) -> None:
        super().__init__(bits, symmetric)
        if not sigmas > 0:
            raise DQError(f"observer 'three-sigma' needs sigmas > 0, got {sigmas!r}")
        self.sigmas = float(sigmas)
        self._n, self._mean, self._squares = 0, 0.0, 0.0  # squares: sum of (x - mean)^2

    def observe(self, values: Tensor) -> None:
        """See a batch."""
        exact = values.double()
        mean = exact.mean()
        self._join(exact.numel(), float(mean), float((exact - mean).square().sum()))

    def absorb(self, other: Self) -> None:
        """Take in what another one has seen."""
        if other._n:
            self._join(other._n, other._mean, other._squares)

    def choose_range(self) -> tuple[float, float]:
        """``mean +- sigmas * sigma``, cut to the smallest and largest value seen."""
        reach = self.sigmas * math.sqrt(self._squares / self._n)
        return max(self.low, self._mean - reach), min(self.high, self._mean + reach)

    def _join(self, n: int, mean: float, squares: float) -> None:
        total, delta = self._n + n, mean - self._mean
        self._squares += squares + delta**2 * self._n * n / total
        self._mean += delta * n / total
        self._n = total
