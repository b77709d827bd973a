"""Where the search starts: groups and ranges from error tables.

Shapes: ``T`` timesteps, ``G`` groups, ``L`` layers, ``Q`` sets of groups (1 or L).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dq_plugins.observers.error import ErrorTable
from dq_plugins.observers.grouping import best_candidates


def best_ranges(labels: Tensor, tables: Mapping[str, ErrorTable], groups: int) -> tuple[Tensor, Tensor]:
    """Best candidate range of every layer in every group: ``low`` and ``high``, each ``[L, G]``.

    Args:
        labels: group of each timestep ``[Q, T]``.
        tables: error tables by layer.
        groups: G; a group without timesteps gets the range that is best for all of them.
    """
    low, high = [], []
    for i, table in enumerate(tables.values()):
        chosen = best_candidates(table, labels[i if len(labels) > 1 else 0], groups)
        low.append(table.low[chosen])
        high.append(table.high[chosen])
    return torch.stack(low), torch.stack(high)


def spread_ranges(tables: Mapping[str, ErrorTable], groups: int) -> tuple[Tensor, Tensor]:
    """`spread` over the best range of each layer at each timestep."""
    choice = torch.stack([table.error.argmin(dim=1) for table in tables.values()])  # [L, T]
    low = torch.stack([table.low[c] for table, c in zip(tables.values(), choice, strict=True)])
    high = torch.stack([table.high[c] for table, c in zip(tables.values(), choice, strict=True)])
    return spread(low, high, groups)


def spread(low: Tensor, high: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Ranges to start from scratch: those of timesteps spread evenly over what changes most.

    The logarithms of the ranges' widths are ordered by their first principal component over the timesteps, which also
    holds where some layers' ranges grow with t and others' shrink; G timesteps are taken at even quantiles, both ends
    included: a timestep whose values no group's range covers would never find one.

    Args:
        low: lower bounds ``[L, T]``.
        high: upper bounds ``[L, T]``.
        groups: G.

    Returns:
        ``low`` and ``high``, each ``[L, G]``.
    """
    width = (high - low).double().clamp(min=1e-30).log()
    component = torch.linalg.svd(width - width.mean(1, keepdim=True), full_matrices=False)[2][0]
    order = component.argsort(stable=True)
    picked = order[torch.linspace(0, len(order) - 1, groups).round().long()]
    return low[:, picked], high[:, picked]
