"""Clip ranges worth trying for one layer whose activations change with the timestep.

Ranges often differ by more than ten times between timesteps, so the widths of candidates are spread evenly in the
logarithm, from the widest range of any timestep down to a part of the narrowest: neighbours are equally close for
every timestep. The min-max ranges of runs of neighbouring timesteps are among them.

Shapes: ``T`` timesteps, ``C`` candidates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOOR = 0.2  # 80 steps of 1 %: as deep as the shrink search of Q-Diffusion goes
RATIO = 1.03
SYMMETRIC_LIMIT, ASYMMETRIC_LIMIT = 320, 640


def candidate_ranges(low: Tensor, high: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Candidate ranges for a layer.

    Args:
        low: smallest value at each timestep ``[T]``.
        high: largest value at each timestep ``[T]``.
        symmetric: whether the candidates are of the form ``(-a, a)``.

    Returns:
        ``low`` and ``high``: float32 ``[C]``, widest first.
    """
    below, above = (-low.double()).clamp(min=0), high.double().clamp(min=0)  # [T] each
    if symmetric:
        bound = torch.maximum(below, above)  # [T]
        # [C], widest first
        bounds = torch.cat([_spread(bound, SYMMETRIC_LIMIT), _some(bound, 64)]).unique().flip(0).float()
        return -bounds, bounds
    fractions = _fractions(below, above)  # [F]
    widths = _spread(below + above, ASYMMETRIC_LIMIT // fractions.numel())  # [W]
    grid = torch.stack([torch.outer(widths, part).reshape(-1) for part in (fractions, 1 - fractions)])  # [2, W F]
    all_below, all_above = torch.cat([grid, _runs(below, above)], dim=1)  # [C] each
    order = (all_below + all_above).argsort(descending=True, stable=True)
    return -all_below[order].float(), all_above[order].float()


def _spread(widths: Tensor, limit: int) -> Tensor:
    """At most ``limit`` widths, evenly in the logarithm, from the largest to ``FLOOR`` times the smallest."""
    widths = widths[widths > 0]
    if not widths.numel():
        return torch.zeros(1, dtype=torch.float64)
    top, bottom = float(widths.max()), float(widths.min()) * FLOOR
    count = min(math.ceil(math.log(top / bottom) / math.log(RATIO)) + 1, limit)
    exponent = torch.linspace(0, math.log(bottom / top), count, dtype=torch.float64)
    return top * exponent.exp()


def _runs(below: Tensor, above: Tensor, limit: int = 256) -> Tensor:
    """Min-max ranges of runs of neighbouring timesteps ``[2, n]``, n about ``limit`` at most; the widest is first."""
    ends = torch.stack([below, above])  # [2, T]
    runs = torch.cat([ends[:, i:].cummax(dim=1).values for i in range(ends.shape[1])], dim=1)  # [2, T (T + 1) / 2]
    runs = runs.unique(dim=1)
    whole = ends.max(dim=1, keepdim=True).values  # [2, 1]
    return torch.cat([whole, _some(runs.T, limit).T], dim=1)


def _some(x: Tensor, limit: int) -> Tensor:
    return x[:: math.ceil(x.numel() / limit)]


def _fractions(below: Tensor, above: Tensor) -> Tensor:
    """Parts of the range that lie below zero: those of the timesteps, and of ranges with one end clipped in half."""
    seen = (below + above) > 0
    if not bool(seen.any()):
        return torch.zeros(1, dtype=torch.float64)
    below, above = below[seen], above[seen]
    own = below / (below + above)
    at = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    clipped_low, clipped_high = below / (below + 2 * above), 2 * below / (2 * below + above)
    union = below.max() / (below.max() + above.max())
    some = torch.stack([union, clipped_low.min(), clipped_low.median(), clipped_high.median(), clipped_high.max()])
    return torch.cat([own.quantile(at), some]).unique()
