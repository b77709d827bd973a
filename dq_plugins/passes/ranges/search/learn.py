"""The search: logits and ranges learned together, until every timestep has decided for one group.

Source: ADP-DM (He et al. 2024).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dq_plugins.artifact import UnitResults
from dq_plugins.errors import RecipeError
from dq_plugins.passes.ranges.search.relaxation import Relaxation, entropy
from dq_plugins.passes.ranges.search.saved_state import STATE, GroupSearchState, load_checkpoint, save_checkpoint
from dq_plugins.passes.ranges.search.settings import SearchSettings

CHECKPOINT_EVERY = 25  # iterations
NOTHING_KEPT = UnitResults(STATE, None, {})


class GroupLoss(Protocol):
    """What a mixture of groups costs. `PointsLoss` and `OutputLoss` are two."""

    @property
    def per_round(self) -> int:
        """Iterations in which every timestep is seen once."""
        ...

    def timesteps(self, iteration: int) -> list[int]:
        """Indices of the timesteps that an iteration sees. A function of the iteration alone."""
        ...

    def loss(self, iteration: int, weights: Tensor, relaxation: Relaxation) -> Tensor:
        """Error relative to the signal for weights ``[Q, n, G]`` of the groups at those timesteps; a scalar."""
        ...


@dataclass(frozen=True)
class LearnedGroups:
    """What the search found.

    Attributes:
        weights: of the groups, ``[Q, T, G]``, at the final temperature.
        low: learned clip bounds ``[L, G]``.
        high: likewise.
        entropy: mean over timesteps at the end, in nats.
        top_weight: mean over timesteps of the largest weight.
        mixture_loss: loss of the mixture over one round of the timesteps, with the final weights.
        hard_loss: the same with each timestep's best group alone.
    """

    weights: Tensor
    low: Tensor
    high: Tensor
    entropy: float
    top_weight: float
    mixture_loss: float
    hard_loss: float


def learn_groups(
    relaxation: Relaxation,
    loss: GroupLoss,
    settings: SearchSettings,
    *,
    scale: float = 1.0,
    kept: UnitResults[GroupSearchState] = NOTHING_KEPT,
) -> Generator[int, None, LearnedGroups]:
    """Learn; yields the number of finished iterations.

    Args:
        relaxation: where to start; it is changed in place.
        loss: what to minimise.
        settings: the objective and its schedules.
        scale: what the loss is divided by, see `SearchSettings`.
        kept: where the state is kept every few iterations. The same call goes on from there.

    Returns:
        (of the generator) the weights and the ranges.

    Raises:
        RecipeError: the loss is not finite.
    """
    iterations = settings.rounds * loss.per_round
    optimiser = torch.optim.Adam(
        [
            {"params": list(relaxation.rows), "lr": settings.learning_rate},
            {"params": [relaxation.log_ends], "lr": settings.range_travel / iterations},
        ],
        fused=True,
    )
    start = load_checkpoint(kept, relaxation, optimiser)
    for iteration in range(start, iterations):
        take_step(iteration, iteration / iterations, relaxation, loss, settings, scale, optimiser)
        if (iteration + 1) % CHECKPOINT_EVERY == 0:
            save_checkpoint(kept, iteration + 1, relaxation, optimiser)
        yield iteration + 1
    return _learned(relaxation, loss, settings)


@torch.enable_grad()
def take_step(
    iteration: int,
    progress: float,
    relaxation: Relaxation,
    loss: GroupLoss,
    settings: SearchSettings,
    scale: float,
    optimiser: torch.optim.Optimizer,
) -> None:
    """One step of the optimiser; ``progress`` is the share of the iterations that are done.

    Raises:
        RecipeError: the loss is not finite.
    """
    weights = relaxation.weights(settings.temperature_at(progress), loss.timesteps(iteration))
    error = loss.loss(iteration, weights, relaxation) / scale
    if not bool(torch.isfinite(error)):
        raise RecipeError(f"the loss of the group search is {error.item()} at iteration {iteration}")
    optimiser.zero_grad()
    (error + settings.entropy_at(progress) * entropy(weights).mean()).backward()
    optimiser.step()


@torch.no_grad()
def _learned(relaxation: Relaxation, loss: GroupLoss, settings: SearchSettings) -> LearnedGroups:
    weights = relaxation.weights(settings.temperature[1])
    one_hot = torch.nn.functional.one_hot(weights.argmax(-1), relaxation.groups).float()
    low, high = relaxation.ranges()
    return LearnedGroups(
        weights,
        low.clone(),
        high.clone(),
        float(entropy(weights).mean()),
        float(weights.amax(-1).mean()),
        mean_loss(loss, weights, relaxation),
        mean_loss(loss, one_hot, relaxation),
    )


@torch.no_grad()
def mean_loss(loss: GroupLoss, weights: Tensor, relaxation: Relaxation, rounds: int = 1) -> float:
    """Loss of given weights ``[Q, T, G]``, mean over the first iterations that see every timestep ``rounds`` times."""
    found = [float(loss.loss(i, weights[:, loss.timesteps(i)], relaxation)) for i in range(rounds * loss.per_round)]
    return sum(found) / len(found)
