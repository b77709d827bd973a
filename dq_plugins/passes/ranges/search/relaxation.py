"""What the search learns: to which degree each timestep belongs to each group, and the groups' clip ranges.

Shapes: ``T`` timesteps, ``G`` groups, ``Q`` sets of groups (1 when all quantizers share them, else one for each
layer), ``L`` layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

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


def start_logits(
    shape: tuple[int, int, int], labels: Tensor | None, *, lead: float, noise: float, generator: torch.Generator
) -> Tensor:
    """Logits to start from.

    Args:
        shape: ``(Q, T, G)``.
        labels: group of each timestep to start at, ``[Q, T]``; None: every group is as likely.
        lead: by how much a timestep's own group leads the next one; the one after that trails by twice as much.
        noise: standard deviation of what is added.
        generator: random numbers.
    """
    start = torch.zeros(shape)
    if labels is not None:
        start = -lead * (torch.arange(shape[-1]) - labels.unsqueeze(-1)).abs().float().expand(shape)
    return start + noise * torch.randn(shape, generator=generator)
