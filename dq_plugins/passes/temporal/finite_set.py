"""The finite set of inputs that a temporal block sees: every timestep, with every recorded condition where they mix.

Where t alone reaches the block there is one point per timestep. Where t is mixed with a class, a size or pooled text,
there is one for each pair of a timestep and a condition: for a class-conditional denoiser all there are, for pooled
text those of the recorded prompts.

Shapes: ``T`` timesteps, ``C`` conditions, ``P = T * C`` points, the condition running fastest.
Source: TFMQ-DM (Huang et al. 2024), the finite set of temporal features; its extension to conditions is our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dq_plugins.calibration import CalibrationSet
from dq_plugins.hashing import raw_bytes
from dq_plugins.passes.temporal.block import TemporalBlock
from dq_plugins.recipe import PassContext

Condition = Mapping[str, Tensor]
"""The arguments of one sample that the block reads besides the timestep, by dotted name."""


@dataclass(frozen=True)
class FiniteSet:
    """Points at which a block is evaluated.

    Attributes:
        timesteps: T timesteps.
        conditions: how many conditions each timestep is paired with (1 where none is read).
        inputs: the block's inputs, ``[P, ...]`` each.
    """

    timesteps: tuple[float, ...]
    conditions: int
    inputs: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.timesteps) * self.conditions

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """The inputs of some points."""
        return {name: value[index] for name, value in self.inputs.items()}

    def by_timestep(self, values: Tensor) -> Tensor:
        """Values ``[P, ...]`` as ``[T, C * ...]``: everything that happens at one timestep in one row."""
        return values.reshape(len(self.timesteps), -1)


def finite_set(block: TemporalBlock, timesteps: Sequence[float], conditions: Sequence[Condition] = ()) -> FiniteSet:
    """Pair every timestep with every condition.

    Args:
        block: the temporal block.
        timesteps: T timesteps.
        conditions: C conditions; needed where the block reads any.
    """
    count = len(conditions) if block.conditions else 1
    inputs = {block.timestep: block.points(timesteps)[block.timestep].repeat_interleave(count, 0)}
    for name in block.conditions:
        stacked = torch.stack([condition[name] for condition in conditions]).to(block.program.device)
        inputs[name] = stacked.repeat(len(timesteps), *[1] * (stacked.dim() - 1))
    return FiniteSet(tuple(timesteps), count, inputs)


def recorded_conditions(calibration: CalibrationSet, names: Sequence[str], most: int) -> list[Condition]:
    """The first distinct conditions of a recording, one sample each (batch dimension 1 kept).

    Args:
        calibration: recorded calls.
        names: dotted names of the arguments.
        most: how many at most.
    """
    found: dict[tuple[bytes, ...], Condition] = {}
    for call in calibration.calls() if names else ():
        batch = len(call.output)
        for row in range(batch):
            inputs = call.rows(torch.tensor([row]), batch).inputs
            condition = {name: inputs[name] for name in names}
            found.setdefault(tuple(bytes(raw_bytes(value)) for value in condition.values()), condition)
            if len(found) == most:
                return list(found.values())
    return list(found.values())


def shared_points(context: PassContext, block: TemporalBlock, timesteps: tuple[float, ...], most: int) -> FiniteSet:
    """Every timestep with every recorded condition that the block reads, found once per run.

    Args:
        context: the run.
        block: the temporal block.
        timesteps: of the plan's schedule.
        most: conditions at most.
    """

    def find() -> FiniteSet:
        return finite_set(block, timesteps, recorded_conditions(context.calibration, block.conditions, most))

    return context.shared(("temporal-points", block.conditions, timesteps, most), find)
