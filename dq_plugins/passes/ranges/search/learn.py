"""The search: logits and ranges learned together, until every timestep has decided for one group.

The objective at an iteration is

    loss / scale  +  entropy * ramp(iteration) * mean over timesteps of  - sum_g w_g ln w_g,

with weights w = softmax(logits / temperature). An entropy weight says nothing without the scale of the loss beside it:
ADP-DM's 0.8 belongs to the squared error of the noise summed over an image. Against an error normalised to around 0.01
the same 0.8 commits before the loss has had an effect.

Source: ADP-DM (Wang et al. 2024).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dq_plugins.artifact import STRICT, Format, StoredTensor, UnitResults
from dq_plugins.artifact.optimizers import OptimizerState, optimizer_state, restore_optimizer
from dq_plugins.errors import RecipeError
from dq_plugins.passes.ranges.search.output import OutputLoss
from dq_plugins.passes.ranges.search.points import PointsLoss
from dq_plugins.passes.ranges.search.relaxation import Relaxation, entropy

CHECKPOINT_EVERY = 25  # iterations
WARMUP = 0.3  # share of the iterations in which the loss decides alone; the entropy is whole after twice this share
TEMPERATURE = (1.0, 0.5)  # of the softmax, at the start and at the end; geometric in between
# About how far a logit can go in all: the learning rate (of Adam) is this over the rounds, and at most so large: with
# few rounds larger steps follow the noise of single images.
TRAVEL, LARGEST_STEP = 20.0, 0.5
# Likewise for the logarithms of the clip bounds. Ranges that move far before the groups are decided widen until they
# serve timesteps of other groups as well; once the entropy counts whole, they may.
RANGE_TRAVEL, DECIDED_TRAVEL = 0.6, 6.0

GroupLoss = PointsLoss | OutputLoss


@dataclass(frozen=True)
class GroupSearchState:
    """What an interrupted search goes on from."""

    __pydantic_config__ = STRICT

    iteration: int
    parameters: dict[str, StoredTensor]
    optimiser: OptimizerState


STATE: Format[GroupSearchState] = Format("group-search", 1, GroupSearchState, what="the state of a group search")
UNIT = "search"
NOTHING_KEPT = UnitResults(STATE, None, {})


class LearnedGroups(NamedTuple):
    """What the search found.

    Attributes:
        weights: of the groups, ``[Q, T, G]``, at the final temperature.
        entropy: mean over timesteps at the end, in nats.
        top_weight: mean over timesteps of the largest weight.
        mixture_loss: loss of the mixture over one round of the timesteps, with the final weights.
        hard_loss: the same with each timestep's best group alone.
    """

    weights: Tensor
    entropy: float
    top_weight: float
    mixture_loss: float
    hard_loss: float


def learn_groups(
    relaxation: Relaxation,
    loss: GroupLoss,
    rounds: int,
    entropy_weight: float = 0.8,
    *,
    warmup: float = WARMUP,
    scale: float = 1.0,
    kept: UnitResults[GroupSearchState] = NOTHING_KEPT,
) -> Generator[int, None, LearnedGroups]:
    """Learn; yields the number of finished iterations.

    Args:
        relaxation: where to start; it is changed in place.
        loss: what to minimise.
        rounds: how often each timestep is visited.
        entropy_weight: weight of the entropy at the end.
        warmup: see `WARMUP`.
        scale: what the loss is divided by.
        kept: where the state is kept every few iterations. The same call goes on from there.

    Raises:
        RecipeError: the loss is not finite.
    """
    iterations = rounds * loss.per_round
    optimiser = torch.optim.Adam(
        [
            {"params": list(relaxation.rows), "lr": min(TRAVEL / rounds, LARGEST_STEP)},
            {"params": [relaxation.log_ends], "lr": RANGE_TRAVEL / iterations},
        ],
        fused=True,
    )
    state = kept.find(UNIT)
    if state is not None:
        relaxation.load_state_dict(state.parameters)
        restore_optimizer(optimiser, state.optimiser)
    for iteration in range(state.iteration if state else 0, iterations):
        progress = iteration / iterations
        temperature = TEMPERATURE[0] * (TEMPERATURE[1] / TEMPERATURE[0]) ** progress
        ramp = min(max(progress - warmup, 0.0) / max(warmup, 1e-9), 1.0)
        weight = entropy_weight * ramp
        optimiser.param_groups[1]["lr"] = (RANGE_TRAVEL if ramp < 1 else DECIDED_TRAVEL) / iterations
        take_step(iteration, relaxation, loss, temperature, weight, scale, optimiser)
        if (iteration + 1) % CHECKPOINT_EVERY == 0:
            parameters = dict(relaxation.named_parameters())
            kept.keep(UNIT, GroupSearchState(iteration + 1, parameters, optimizer_state(optimiser)))
        yield iteration + 1
    return _learned(relaxation, loss)


@torch.enable_grad()
def take_step(
    iteration: int,
    relaxation: Relaxation,
    loss: GroupLoss,
    temperature: float,
    entropy_weight: float,
    scale: float,
    optimiser: torch.optim.Optimizer,
) -> None:
    """One step of the optimiser.

    Raises:
        RecipeError: the loss is not finite.
    """
    weights = relaxation.weights(temperature, loss.timesteps(iteration))
    error = loss.loss(iteration, weights, relaxation) / scale
    if not bool(torch.isfinite(error)):
        raise RecipeError(f"the loss of the group search is {error.item()} at iteration {iteration}")
    optimiser.zero_grad()
    (error + entropy_weight * entropy(weights).mean()).backward()
    optimiser.step()


@torch.no_grad()
def _learned(relaxation: Relaxation, loss: GroupLoss) -> LearnedGroups:
    weights = relaxation.weights(TEMPERATURE[1])
    one_hot = torch.nn.functional.one_hot(weights.argmax(-1), relaxation.groups).float()
    losses = [mean_loss(loss, each, relaxation) for each in (weights, one_hot)]
    return LearnedGroups(weights, float(entropy(weights).mean()), float(weights.amax(-1).mean()), *losses)


@torch.no_grad()
def mean_loss(loss: GroupLoss, weights: Tensor, relaxation: Relaxation) -> float:
    """Loss of given weights ``[Q, T, G]``, mean over the first iterations that see every timestep once."""
    found = [float(loss.loss(i, weights[:, loss.timesteps(i)], relaxation)) for i in range(loss.per_round)]
    return sum(found) / len(found)
