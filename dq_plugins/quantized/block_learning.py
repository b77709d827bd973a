"""Variables of one block's layers, learned against the block's own full-precision output."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dq_plugins.artifact import UnitResults
from dq_plugins.calibration import CalibrationSet
from dq_plugins.graph import Partition
from dq_plugins.quantized.block_cache import BlockCache, BlockRecorder, block_loss
from dq_plugins.quantized.learned_values import Key, PlannedVariables
from dq_plugins.quantized.learner import Learned, Learner, LearnerState
from dq_plugins.quantized.reconstruction_units import Unit, find_units
from dq_plugins.quantized.resuming import NOTHING_KEPT, resumable
from dq_plugins.quantized.rounding_variables import RoundingMethod
from dq_plugins.quantized.run import States
from dq_plugins.scratch import Scratch

HELD_OUT = 4  # one call in so many is judged on, the others are learned from


def learn_block(
    planned: PlannedVariables,
    cache: BlockCache,
    states: States,
    method: RoundingMethod,
    generator: torch.Generator,
    kept: UnitResults[LearnerState] = NOTHING_KEPT,
) -> Generator[int, None, Learned[Key]]:
    """Learn; yields the number of finished iterations.

    Args:
        planned: variables of the block's layers.
        cache: its recorded calls. Some are held out, and decide whether what is learned is any better; all of them
            where there are too few.
        states: what its layers compute with.
        method: how long and how fast.
        generator: of the order of the calls.
        kept: states of interrupted learning, see `resumable`; by the block's name.
    """
    calls = list(range(len(cache)))
    judged = calls[HELD_OUT - 1 :: HELD_OUT] or calls
    learned = [call for call in calls if call not in judged] or calls
    order = torch.randint(len(learned), (method.iterations,), generator=generator).tolist()

    def error(values: dict[Key, Tensor], call: int) -> Tensor:
        return block_loss(planned.run, cache, call, planned.states(states, values))

    learner = Learner(
        planned.variables,
        lambda values, i: error(values, learned[order[i]]),
        method,
        judge=lambda values, i: error(values, judged[i]),
        probes=len(judged),
    )
    return resumable(learner, kept, cache.unit.module)


@contextmanager
def block_recorder(
    units: list[Unit], partition: Partition, calls: CalibrationSet, folder: Path | None
) -> Iterator[BlockRecorder]:
    """A recorder whose files are gone afterwards; they lie in ``folder``."""
    everything = find_units(partition, partition.layers)
    with Scratch("blocks", folder) as own:
        yield BlockRecorder(units, calls, own, everything)
