"""What the search learns, and where it starts: the share of each group in each timestep, and the groups' clip ranges.

Shapes: ``T`` timesteps, ``G`` groups, ``Q`` sets of groups (1 when all quantizers share them, else one for each
layer), ``L`` layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dq_plugins.observers.error import ErrorTable
from dq_plugins.observers.grouping import best_candidates

LEAD = 2.0  # by how much a timestep's own group leads the next one at the start; the one after trails by twice that
NOISE = 0.01  # standard deviation of the logits at the start
LEAST = 1e-3  # of a range's width: a bound at 0 has no logarithm, and a bound this small rounds to 0


class Relaxation(nn.Module):
    """Logits and ranges.

    Args:
        logits: ``[Q, T, G]``.
        low: clip bounds to start from, ``[L, G]``, none above 0.
        high: likewise, none below 0.
    """

    def __init__(self, logits: Tensor, low: Tensor, high: Tensor) -> None:
        super().__init__()
        # A parameter for each timestep: the optimiser leaves alone those that an iteration does not visit.
        self.rows = nn.ParameterList([nn.Parameter(row) for row in logits.float().unbind(1)])
        ends = torch.stack([-low, high], dim=-1).double().clamp(min=0)
        width = ends.sum(-1, keepdim=True).clamp(min=1e-30)
        self.log_ends = nn.Parameter(ends.maximum(LEAST * width).log().float())

    @property
    def groups(self) -> int:
        """G."""
        return self.rows[0].shape[-1]

    def weights(self, temperature: float, timesteps: Sequence[int] | None = None) -> Tensor:
        """Weights of the groups at some timesteps (all by default), by index: ``[Q, n, G]``."""
        rows = self.rows if timesteps is None else [self.rows[i] for i in timesteps]
        return torch.softmax(torch.stack(list(rows), dim=1) / temperature, dim=-1)

    def ranges(self) -> tuple[Tensor, Tensor]:
        """Clip bounds ``low`` and ``high``, each ``[L, G]``."""
        ends = self.log_ends.exp()
        return -ends[..., 0], ends[..., 1]


def entropy(weights: Tensor) -> Tensor:
    """``- sum_g w_g ln w_g``: the shape of ``weights`` without its last dimension."""
    # a weight that underflows to 0 must not give the gradient an infinite logarithm
    return -(weights * weights.clamp(min=1e-12).log()).sum(-1)


def start_logits(shape: tuple[int, int, int], labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """Logits ``[Q, T, G]`` to start from, with a little noise.

    Args:
        shape: ``(Q, T, G)``.
        labels: group of each timestep to start at, ``[Q, T]``; None: every group is as likely.
        generator: random numbers.
    """
    start = torch.zeros(shape)
    if labels is not None:
        start = -LEAD * (torch.arange(shape[-1]) - labels.unsqueeze(-1)).abs().float().expand(shape)
    return start + NOISE * torch.randn(shape, generator=generator)


def best_ranges(labels: Tensor, tables: Mapping[str, ErrorTable], groups: int) -> tuple[Tensor, Tensor]:
    """Best candidate range of every layer in every group: ``low`` and ``high``, each ``[L, G]``.

    Args:
        labels: group of each timestep ``[Q, T]``.
        tables: error tables by layer.
        groups: G; a group without timesteps gets the range that is best for all of them.
    """
    rows = labels.expand(len(tables), -1)  # [L, T]
    chosen = [best_candidates(table, row, groups) for table, row in zip(tables.values(), rows, strict=True)]
    return _ends(tables, chosen)


def spread_ranges(tables: Mapping[str, ErrorTable], groups: int) -> tuple[Tensor, Tensor]:
    """`spread` over the best range of each layer at each timestep."""
    return spread(*_ends(tables, [table.error.argmin(dim=1) for table in tables.values()]), groups)


def _ends(tables: Mapping[str, ErrorTable], chosen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    pairs = list(zip(tables.values(), chosen, strict=True))
    return torch.stack([table.low[c] for table, c in pairs]), torch.stack([table.high[c] for table, c in pairs])


def spread(low: Tensor, high: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Ranges ``low`` and ``high``, each ``[L, G]``, to start from scratch: those of timesteps spread over the changes.

    The logarithms of the ranges' widths are ordered by their first principal component over the timesteps, which also
    holds where some layers' ranges grow with t and others' shrink; G timesteps are taken at even quantiles, both ends
    included: a timestep whose values no group's range covers would never find one.

    Args:
        low: lower bounds ``[L, T]``.
        high: upper bounds ``[L, T]``.
        groups: G.
    """
    width = (high - low).double().clamp(min=1e-30).log()
    component = torch.linalg.svd(width - width.mean(1, keepdim=True), full_matrices=False)[2][0]
    order = component.argsort(stable=True)
    picked = order[torch.linspace(0, len(order) - 1, groups).round().long()]
    return low[:, picked], high[:, picked]
