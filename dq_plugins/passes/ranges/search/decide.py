"""From weights to groups: one group for each timestep, neighbours joined where that costs nothing.

Shapes: ``T`` timesteps, ``G`` groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dq_plugins.observers.error import ErrorTable
from dq_plugins.observers.grouping import best_candidates, best_partitions, run_costs
from dq_plugins.timesteps import TimestepGroups

TINY = 1e-30


def decided(weights: Tensor, *, contiguous: bool) -> Tensor:
    """Group of each timestep.

    Args:
        weights: ``[T, G]``.
        contiguous: groups are runs of timesteps: of all ways to cut the schedule into at most G runs, the one with the
            largest summed log weight, exactly. Otherwise each timestep's heaviest group.

    Returns:
        Labels ``[T]``: numbered from 0 in the order of their first timestep, without gaps (empty groups are gone).
    """
    if not contiguous:
        return renumbered(weights.argmax(-1))
    steps, groups = weights.shape
    surprise = -weights.double().clamp(min=TINY).log()
    cost = run_costs(ErrorTable(torch.empty(0), torch.empty(0), surprise, 1.0))
    curve, starts = best_partitions(cost, groups)
    count = int((curve <= curve[-1] + 1e-9).nonzero()[0])  # no more runs than are any use
    return labels_from_starts(starts[count], steps)


def learned_groups(labels: Tensor, weights: Tensor) -> Tensor:
    """The learned group that each decided one goes on with: that with the largest summed log weight.

    Args:
        labels: decided group of each timestep, ``[T]``.
        weights: ``[T, G]``.

    Returns:
        int64, one for each decided group.
    """
    summed = weights.new_zeros(int(labels.max()) + 1, weights.shape[1], dtype=torch.float64)
    summed.index_add_(0, labels, weights.double().clamp(min=TINY).log())
    return summed.argmax(1)


def labels_from_starts(starts: Sequence[int], steps: int) -> Tensor:
    """Labels ``[T]`` of runs that begin at 0 and at ``starts``."""
    sizes = torch.tensor([b - a for a, b in pairwise([0, *starts, steps])])
    return torch.repeat_interleave(sizes)


def renumbered(labels: Tensor) -> Tensor:
    """The same groups, numbered from 0 in the order of their first timestep."""
    names: dict[int, int] = {}
    return torch.tensor([names.setdefault(int(label), len(names)) for label in labels])


def merged(labels: Tensor, tables: Mapping[str, ErrorTable], tolerance: float) -> Tensor:
    """Join groups while the summed relative error of the activations rises by no more than a share of itself.

    Each join is the cheapest at the time; ranges are estimated again for the joined group. A search that was given more
    groups than there are regimes ends with as many as there are. Labels are ``[T]``; ``tolerance`` is the share of the
    summed error by which it may rise in all.
    """
    start = group_error(labels, tables)
    while int(labels.max()) > 0:
        pairs = [(a, b) for a in range(int(labels.max()) + 1) for b in _neighbours(labels, a) if a < b]
        joined = [renumbered(torch.where(labels == b, a, labels)) for a, b in pairs]
        errors = [group_error(candidate, tables) for candidate in joined]
        best = min(range(len(pairs)), key=errors.__getitem__)
        if errors[best] > start * (1 + tolerance) + TINY:
            break
        labels = joined[best]
    return labels


def _neighbours(labels: Tensor, group: int) -> set[int]:
    """Groups that have a timestep beside one of this group: joining others would part no fewer runs."""
    here = (labels == group).nonzero().flatten().tolist()
    beside = {i + d for i in here for d in (-1, 1)} & set(range(len(labels)))
    return {int(labels[i]) for i in beside} - {group}


def group_error(labels: Tensor, tables: Mapping[str, ErrorTable]) -> float:
    """Summed relative error of the layers when each group has its best candidate range."""
    total = 0.0
    for table in tables.values():
        chosen = best_candidates(table, labels, int(labels.max()) + 1)[labels]
        error = table.error.gather(1, chosen[:, None]).mean()
        total += float(error) / (table.power if table.power > 0 else 1.0)
    return total


def as_runs(
    labels: Tensor, timesteps: Sequence[float], bounds: tuple[float, float]
) -> tuple[TimestepGroups, tuple[int, ...]]:
    """Groups as the plan holds them: runs of timesteps, with edges halfway between neighbours.

    Args:
        labels: ``[T]``.
        timesteps: ascending ``[T]``.
        bounds: timesteps from and to which the groups are valid.

    Returns:
        The runs, and the label of each: two runs of one label share their ranges.
    """
    starts = [i for i in range(1, len(labels)) if labels[i] != labels[i - 1]]
    edges = tuple((timesteps[i - 1] + timesteps[i]) / 2 for i in starts)
    return TimestepGroups(edges, *bounds), tuple(int(labels[i]) for i in [0, *starts])
