"""State of an interrupted search: parameters, optimiser and iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dq_plugins.artifact import STRICT, Format, StoredTensor, UnitResults
from dq_plugins.artifact.optimizers import OptimizerState, optimizer_state, restore_optimizer
from dq_plugins.passes.ranges.search.relaxation import Relaxation

UNIT = "search"


@dataclass(frozen=True)
class GroupSearchState:
    """What a search of timestep groups goes on from."""

    __pydantic_config__ = STRICT

    iteration: int
    parameters: dict[str, StoredTensor]
    optimiser: OptimizerState


STATE: Format[GroupSearchState] = Format("group-search", 1, GroupSearchState, what="the state of a group search")


def save_checkpoint(
    kept: UnitResults[GroupSearchState], iteration: int, relaxation: Relaxation, optimiser: torch.optim.Optimizer
) -> None:
    """Keep the state after some iterations."""
    state = GroupSearchState(iteration, dict(relaxation.named_parameters()), optimizer_state(optimiser))
    kept.keep(UNIT, state)


def load_checkpoint(
    kept: UnitResults[GroupSearchState], relaxation: Relaxation, optimiser: torch.optim.Optimizer
) -> int:
    """Restore the state in place; returns the number of iterations that were done, 0 where there is no such state."""
    state = kept.find(UNIT)
    if state is None:
        return 0
    relaxation.load_state_dict(state.parameters)
    restore_optimizer(optimiser, state.optimiser)
    return state.iteration
