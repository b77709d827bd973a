"""Timestep groups: sets of neighbouring timesteps that share quantization parameters.

The map ``t -> group`` is data: sorted edges. Group ``g`` is the number of edges that are <= t, so group 0 holds the
smallest timesteps, and a timestep that was never recorded falls into the group of its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dq_plugins.errors import TimestepError


@dataclass(frozen=True)
class TimestepGroups:
    """Contiguous groups of timesteps.

    Attributes:
        edges: strictly ascending boundaries; ``len(edges) + 1`` groups.
        low: smallest timestep for which the groups are valid.
        high: largest timestep for which the groups are valid.

    Example:
        >>> TimestepGroups(edges=(250.0, 750.0)).of(500)
        1
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (a file with other fields is not of this kind)

    edges: tuple[float, ...] = ()
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", tuple(float(e) for e in self.edges))
        if not all(math.isfinite(e) for e in self.edges):
            raise TimestepError(f"group edges must be finite, got {self.edges}")
        if any(a >= b for a, b in pairwise(self.edges)):
            raise TimestepError(f"group edges must ascend strictly, got {self.edges}")
        if not self.low <= self.high:
            raise TimestepError(f"groups are valid from low to high, got low={self.low} > high={self.high}")

    @classmethod
    def one_per_timestep(cls, timesteps: Sequence[float], **bounds: float) -> TimestepGroups:
        """One group for each distinct timestep, with edges halfway between neighbours."""
        distinct = sorted({float(t) for t in timesteps})
        return cls(tuple((a + b) / 2 for a, b in pairwise(distinct)), **bounds)

    def __len__(self) -> int:
        return len(self.edges) + 1

    def of(self, timestep: float) -> int:
        """Group of one timestep.

        Raises:
            TimestepError: the timestep lies outside ``[low, high]``.
        """
        self.check(timestep, timestep)
        return sum(edge <= timestep for edge in self.edges)

    def check(self, smallest: float, largest: float) -> None:
        """Raise `TimestepError` unless ``[smallest, largest]`` lies inside the valid range (NaN does not)."""
        if not (self.low <= smallest and largest <= self.high):
            culprit = smallest if not smallest >= self.low else largest
            raise TimestepError(
                f"timestep {culprit:g} lies outside [{self.low:g}, {self.high:g}], the range in which these "
                f"{len(self)} timestep groups were calibrated: their quantization ranges say nothing about it. "
                "Record the calibration set with a schedule that covers it, or set out_of_range='nearest'."
            )

    def index(self, timestep: Tensor) -> Tensor:
        """Group of every timestep: int64, the shape of ``timestep``. Pure tensor code: no host sync, exports."""
        # float64, as `of`: float32 would round an edge, and integers beyond 2^24, over each other
        dtype = torch.float32 if timestep.device.type == "mps" else torch.float64
        edges = torch.tensor(self.edges, dtype=dtype, device=timestep.device)
        return (timestep.to(dtype).unsqueeze(-1) >= edges).sum(-1)
