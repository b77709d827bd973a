"""Timestep groups with the least quantization error, for every number of groups at once.

Groups are runs of neighbouring timesteps. The cost of a run for a layer is the error of its best candidate range,

    cost(i, j) = min_c sum_{t = i..j} E[t, c],

and the least cost of the first j timesteps in g groups is

    D(g, j) = min_i D(g - 1, i) + cost(i, j - 1),

an exact dynamic program. Edges are shared by all layers (costs summed), or chosen for each layer. Every candidate is
open to every run, so no layer's error ever exceeds that of one range for all timesteps, however the edges were chosen.
ADP-DM (arXiv 2305.18723) learns such groups by gradient descent; for neighbouring timesteps this is the optimum.

Shapes: ``T`` timesteps, ``G`` groups, ``C`` candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dq_plugins.errors import DQError
from dq_plugins.observers.error import ErrorTable
from dq_plugins.timesteps import TimestepGroups

TIE = 1e-9  # relative difference below which errors count as equal


def run_costs(table: ErrorTable) -> Tensor:
    """Error of every run of timesteps with its best candidate.

    Returns:
        float64 ``[T, T + 1]``: entry ``[i, j]`` is the summed error of timesteps ``i .. j - 1``, infinite for
        ``j <= i``.
    """
    steps = table.error.shape[0]
    cost = torch.full((steps, steps + 1), torch.inf, dtype=torch.float64)
    for i in range(steps):
        cost[i, i + 1 :] = table.error[i:].cumsum(0).amin(dim=1)
    return cost


def best_candidates(table: ErrorTable, membership: Tensor, count: int) -> Tensor:
    """Best candidate range of each group, however the groups were chosen.

    The candidate that is best for all timesteps stays unless another is really better (by more than rounding), so a
    layer that does not change with the timestep gets the same range everywhere. A group without timesteps has it too.

    Args:
        table: errors of one layer.
        membership: group of each timestep, int64 ``[T]``.
        count: number of groups.

    Returns:
        Indices of candidates, int64 ``[G]``.
    """
    empty = torch.zeros((count, table.error.shape[1]), dtype=torch.float64)
    sums = empty.index_add_(0, membership, table.error)  # [G, C]
    static = int(table.error.sum(0).argmin())
    least, choice = sums.min(dim=1)  # [G] each
    return torch.where(least < sums[:, static] * (1 - TIE), choice, static)


def best_partitions(cost: Tensor, max_groups: int | None = None) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Partitions into 1, 2, ... contiguous groups with the least summed cost.

    Args:
        cost: ``[T, T + 1]``, see `run_costs`.
        max_groups: largest number of groups; T by default.

    Returns:
        The least cost for each number of groups, float64 ``[G]``, and the starts of the groups after the first.
    """
    steps = cost.shape[0]
    largest = min(max_groups or steps, steps)
    least = cost[0].clone()  # D(1, j), [T + 1]
    curve, came_from = [least[steps]], []
    for _ in range(1, largest):
        # D(g, j) = min over i of D(g - 1, i) + cost[i, j]; the group that ends at j starts at i.
        least, start = (least[:steps, None] + cost).min(dim=0)  # [T, T + 1] -> [T + 1] each
        curve.append(least[steps])
        came_from.append(start)
    return torch.stack(curve), [_trace_back(came_from[:g], steps) for g in range(largest)]


def _trace_back(came_from: Sequence[Tensor], steps: int) -> tuple[int, ...]:
    starts: list[int] = []
    end = steps
    for start in reversed(came_from):
        end = int(start[end])
        starts.append(end)
    return tuple(reversed(starts))


@dataclass(frozen=True)
class Grouping:
    """Optimal groups for every number of groups.

    Attributes:
        timesteps: ascending ``[T]``.
        curve: summed normalised error for G = 1, 2, ... groups; entry ``G - 1``, never rising.
        starts: for each G, indices of the first timesteps of the groups after the first.
        tables: error tables by layer.
        bounds: timesteps from and to which the groups are valid.
    """

    timesteps: tuple[float, ...]
    curve: tuple[float, ...]
    starts: tuple[tuple[int, ...], ...]
    tables: Mapping[str, ErrorTable]
    bounds: tuple[float, float]

    def groups(self, count: int) -> TimestepGroups:
        """The best ``count`` groups (T where there are fewer timesteps); edges lie halfway between timesteps."""
        edges = [(self.timesteps[s - 1] + self.timesteps[s]) / 2 for s in self.starts[self._index(count)]]
        return TimestepGroups(tuple(edges), *self.bounds)

    def ranges(self, count: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Best candidate of every layer in each of ``count`` groups: float32 ``low [G]`` and ``high [G]``."""
        membership, groups = self._membership(count)
        chosen = {layer: best_candidates(table, membership, groups) for layer, table in self.tables.items()}
        return {layer: (self.tables[layer].low[c], self.tables[layer].high[c]) for layer, c in chosen.items()}

    def errors(self, count: int) -> dict[str, float]:
        """Error of every layer with ``count`` groups, relative to its signal power, mean over timesteps."""
        membership, groups = self._membership(count)
        found = {}
        for layer, table in self.tables.items():
            chosen = best_candidates(table, membership, groups)[membership]  # [T]
            found[layer] = float(table.error.gather(1, chosen[:, None]).mean()) / _power(table)
        return found

    def _membership(self, count: int) -> tuple[Tensor, int]:
        starts = self.starts[self._index(count)]
        sizes = torch.tensor([b - a for a, b in pairwise([0, *starts, len(self.timesteps)])])
        return torch.repeat_interleave(sizes), len(sizes)

    def _index(self, count: int) -> int:
        if count < 1:
            raise DQError(f"at least one timestep group is needed, got {count}")
        return min(count, len(self.starts)) - 1


def _power(table: ErrorTable) -> float:
    return table.power if table.power > 0 else 1.0


def optimal_groups(
    tables: Mapping[str, ErrorTable],
    timesteps: Sequence[float],
    *,
    max_groups: int | None = None,
    weights: Mapping[str, float] | None = None,
    bounds: tuple[float, float] = (-torch.inf, torch.inf),
) -> Grouping:
    """Groups shared by all layers with the least summed error, for every number of groups.

    Args:
        tables: error tables by layer, over the same timesteps.
        timesteps: ascending ``[T]``.
        max_groups: largest number of groups; T by default.
        weights: weight of each layer's summed error; by default ``1 / (signal power * T)``, so that layers count
            alike whatever their scale, and the curve is the sum over layers of relative errors.
        bounds: timesteps from and to which the groups are valid.

    Raises:
        DQError: no tables, or tables of other timesteps.
    """
    steps = len(timesteps)
    if not tables or not steps:
        raise DQError("timestep groups need the error table of at least one layer and at least one timestep")
    total = torch.zeros((steps, steps + 1), dtype=torch.float64)
    for layer, table in tables.items():
        if table.error.shape[0] != steps:
            raise DQError(f"the error table of {layer!r} has {table.error.shape[0]} timesteps, expected {steps}")
        weight = weights[layer] if weights is not None else 1.0 / (_power(table) * steps)
        cost = run_costs(table)
        total += torch.where(cost.isinf(), cost, weight * cost)  # a weight of 0 must not make empty runs NaN
    curve, starts = best_partitions(total, max_groups)
    return Grouping(tuple(timesteps), tuple(curve.tolist()), tuple(starts), dict(tables), bounds)


def uniform_groups(
    timesteps: Sequence[float], count: int, *, bounds: tuple[float, float] = (-torch.inf, torch.inf)
) -> TimestepGroups:
    """Groups of equally many neighbouring timesteps, as far as they divide; what optimal groups are compared with.

    Args:
        timesteps: the distinct timesteps that were recorded.
        count: number of groups; at most one for each timestep.
        bounds: timesteps from and to which the groups are valid.
    """
    t = sorted({float(t) for t in timesteps})
    if count < 1 or not t:
        raise DQError(f"at least one group and one timestep are needed, got {count} and {len(t)}")
    count = min(count, len(t))
    starts = [round(g * len(t) / count) for g in range(1, count)]
    return TimestepGroups(tuple((t[s - 1] + t[s]) / 2 for s in starts), *bounds)
