"""Intervals of candidate timesteps, of which sampling visits exactly one each.

Choosing K of 1000 timesteps freely is hopeless; choosing one in each of K neighbouring intervals is small, and keeps
the schedule spread out. Quadratic intervals are finer near t = 0, where the image takes shape:

    b_k = low + floor((k sqrt(0.8 (high - low)) / (K - 1))^2),  k = 1 .. K - 1      (low = 0, high = 1000: TMPQ-DM)

Source: TMPQ-DM (Sun et al. 2024) and its code; the data-driven intervals are ours. Candidates are the ``grid``; a
boundary that would leave an interval without a candidate moves to the next one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dq_plugins.errors import BudgetError

Spacing = Literal["quadratic", "uniform", "change"]

QUADRATIC_SHARE = 0.8
"""Where the last interval begins, as a share of the range: 800 of 1000 in the paper's code."""


@dataclass(frozen=True)
class StepIntervals:
    """K intervals over a grid of candidate timesteps.

    Attributes:
        grid: candidate timesteps, ascending.
        starts: position in the grid where each interval begins, ascending from 0; ``K`` of them.

    Example:
        >>> StepIntervals((10.0, 20.0, 30.0), (0, 1)).members(1)
        (20.0, 30.0)
    """

    grid: tuple[float, ...]
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.starts)

    def members(self, interval: int) -> tuple[float, ...]:
        """Candidates of an interval, ascending; interval 0 is the one at the end of sampling."""
        ends = (*self.starts[1:], len(self.grid))
        return self.grid[self.starts[interval] : ends[interval]]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Candidates in each interval."""
        return tuple(len(self.members(k)) for k in range(len(self)))

    def timesteps(self, choice: Sequence[int]) -> tuple[float, ...]:
        """The schedule, descending, that takes member ``choice[k]`` of interval k."""
        return tuple(self.members(k)[c] for k, c in enumerate(choice))[::-1]

    def nearest(self, timesteps: Sequence[float]) -> tuple[int, ...]:
        """The choice closest to a schedule of as many timesteps: in each interval the member nearest to its own."""
        wanted = sorted(timesteps)
        if len(wanted) != len(self):
            raise BudgetError(f"{len(self)} intervals take {len(self)} timesteps, got {len(wanted)}")
        return tuple(int(np.abs(np.subtract(self.members(k), t)).argmin()) for k, t in enumerate(wanted))


def quadratic_bounds(low: float, high: float, count: int) -> list[float]:
    """Lower bounds of intervals 1 .. K - 1 in ``[low, high)``, as the paper's code computes them."""
    root = math.sqrt(QUADRATIC_SHARE * (high - low))
    return [low + math.floor((k * root / (count - 1)) ** 2) for k in range(1, count)]


def change_bounds(grid: Sequence[float], change: Sequence[float], count: int) -> list[float]:
    """Lower bounds of intervals that share the change of the trajectory equally.

    Leaving out a step of length h costs about ``h^2`` times the local change, and the sum of such terms over a fixed
    length is least where ``h sqrt(change)`` is equal everywhere: so the intervals share its integral.

    Args:
        grid: timesteps, ascending.
        change: at each of them, how far a step twice as long goes astray; not negative.
        count: ``K``.
    """
    share = np.cumsum(np.sqrt(np.maximum(np.asarray(change, dtype=np.float64), 0)) + 1e-12)
    return [float(grid[int(np.searchsorted(share, share[-1] * k / count, side="right"))]) for k in range(1, count)]


def step_intervals(
    grid: Sequence[float],
    count: int,
    method: Spacing = "quadratic",
    *,
    bounds: tuple[float, float] | None = None,
    change: Sequence[float] | None = None,
) -> StepIntervals:
    """Cut a grid of candidate timesteps into intervals.

    Args:
        grid: candidates, in any order.
        count: ``K``, at most the number of candidates.
        method: ``"quadratic"`` (the paper's), ``"uniform"``, or ``"change"`` (needs ``change``).
        bounds: range of timesteps that the formulas divide; by default from 0 to just above the largest candidate.
        change: for ``"change"``, one value for each candidate, ascending.

    Raises:
        BudgetError: more intervals than candidates, or no ``change`` where it is needed.
    """
    ascending = sorted({float(t) for t in grid})
    if not 1 <= count <= len(ascending):
        raise BudgetError(
            f"{count} steps cannot be chosen from {len(ascending)} candidate timesteps; record more denoising "
            "steps, or ask for fewer"
        )
    low, high = bounds or (min(0.0, ascending[0]), ascending[-1] + 1)
    if method == "change" and (change is None or len(change) != len(ascending)):
        raise BudgetError("intervals by change need the change of the trajectory at every candidate timestep")
    if count == 1:
        edges = []
    elif method == "change":
        edges = change_bounds(ascending, change or (), count)
    elif method == "quadratic":
        edges = quadratic_bounds(low, high, count)
    else:
        edges = [low + (high - low) * k / count for k in range(1, count)]
    starts = [0]
    for k, edge in enumerate(edges, 1):
        wanted = int(np.searchsorted(ascending, edge))
        # at least one candidate behind, and enough left for the intervals to come
        starts.append(min(max(wanted, starts[-1] + 1), len(ascending) - (count - k)))
    return StepIntervals(tuple(ascending), tuple(starts))


def thinned(timesteps: Sequence[float], most: int) -> tuple[float, ...]:
    """At most so many of some ascending timesteps, evenly spread, the first and the last among them."""
    count = min(len(timesteps), most)
    if count <= 1:
        return tuple(timesteps[-1:])
    return tuple(timesteps[round(i * (len(timesteps) - 1) / (count - 1))] for i in range(count))
