"""Searches that are interrupted in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dq_plugins.passes.steps.fitness import SamplingFitness


@contextmanager
def interrupted_after(scores: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside of the block, raise `KeyboardInterrupt` in the place of every score after so many."""
    original, left = SamplingFitness.__call__, [scores]

    def stopping(self, candidate, rung):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(self, candidate, rung)

    with monkeypatch.context() as patch:
        patch.setattr(SamplingFitness, "__call__", stopping)
        yield
