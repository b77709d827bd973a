"""Long optimisations that keep their state on the way, so that a kill costs seconds and not the optimisation."""

from __future__ import annotations

import time
from collections.abc import Generator

from dq_plugins.artifact import Format, UnitResults
from dq_plugins.quantized.learner import Key, Learned, Learner, LearnerState

KEPT_EVERY_S = 30.0
STATE: Format[LearnerState] = Format("learner-state", 4, LearnerState, what="the state of a learner")
NOTHING_KEPT = UnitResults(STATE, None, {})


def resumable(learner: Learner[Key], kept: UnitResults[LearnerState], unit: str) -> Generator[int, None, Learned[Key]]:
    """`Learner.run` that begins where an interrupted one was; yields the number of finished iterations.

    Args:
        learner: new; all that it learns is decided together.
        kept: where states are; `forget` the unit there when what was learned is safe.
        unit: its name there.
    """
    if (state := kept.find(unit)) is not None:
        learner.restore(state)
    running, kept_at = learner.run(), time.monotonic()
    while True:
        try:
            done = next(running)
        except StopIteration as stop:
            return stop.value
        if kept.folder is not None and time.monotonic() - kept_at >= KEPT_EVERY_S:
            kept.keep(unit, learner.state())
            kept_at = time.monotonic()
        yield done
