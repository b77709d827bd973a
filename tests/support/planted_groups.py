"""Activations with planted regimes: the scale of every layer's input depends on the timestep's regime alone."""

from __future__ import annotations

import torch
from torch import Tensor

from dq_plugins.passes.ranges.search.learn import LearnedGroups, learn_groups, mean_loss
from dq_plugins.passes.ranges.search.points import PointsLoss
from dq_plugins.passes.ranges.search.relaxation import Relaxation, spread, start_logits

SCALES = (0.5, 1.5, 5.0)
BITS = 4


def planted(seed: int, *, steps: int = 24, layers: int = 2, shuffled: bool = False) -> tuple[Tensor, Tensor]:
    """Values ``[L, T, N]`` of three regimes, and the regime of each timestep ``[T]``."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (int(torch.randint(low, low + 5, (), generator=generator)) for low in (5, 13))
    regime = torch.tensor([0] * first + [1] * (second - first) + [2] * (steps - second))
    if shuffled:
        regime = regime[torch.randperm(steps, generator=generator)]
    own = torch.tensor(SCALES) * (1 + 0.2 * torch.rand(layers, 3, generator=generator))
    values = torch.randn(layers, steps, 96, generator=generator) * own[:, regime].unsqueeze(-1)
    return values, regime


def points_loss(values: Tensor) -> PointsLoss:
    weights = torch.full_like(values, 1 / values.shape[-1])
    return PointsLoss(values, weights, [BITS] * len(values), symmetric=False)


def finished(generator):
    """What a generator returns."""
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value


def search(values: Tensor, seed: int, groups: int, rounds: int = 200, **options) -> LearnedGroups:
    """The search from scratch, on the scale of one static range."""
    loss, (low, high) = points_loss(values), (values.amin(-1), values.amax(-1))
    whole = Relaxation(torch.zeros(1, 1, 1), low.amin(1, keepdim=True), high.amax(1, keepdim=True))
    scale = mean_loss(loss, torch.ones(1, values.shape[1], 1), whole)
    generator = torch.Generator().manual_seed(seed)
    logits = start_logits((1, values.shape[1], groups), None, generator)
    relaxation = Relaxation(logits, *spread(low, high, groups))
    return finished(learn_groups(relaxation, loss, rounds, scale=scale, **options))
