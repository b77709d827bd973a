"""The smallest and the largest value."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Self

from dq_plugins.observers.observer import Observer


class MinMaxObserver(Observer):
    """The range that clips nothing. Right for finite sets of values, such as what depends on the timestep alone."""

    name = "minmax"

    def observe(self, values: Tensor) -> None:
        """Nothing to do: the base class keeps the smallest and the largest value."""

    def absorb(self, other: Self) -> None:
        """Nothing to do."""

    def choose_range(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return self.low, self.high
