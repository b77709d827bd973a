"""What a long command is doing, and how long it will take: a line at every stage, and some in a stage that is long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from dq_plugins.progress import clock

SILENCE = 15.0
"""Seconds after which a stage says that it goes on."""


class Stages:
    """Announces stages with the seconds since the start and an estimate of those to the end.

    The estimate scales the expected times by how long the finished stages took here.

    Args:
        expected: seconds of each stage, in order, of which the proportions count; empty: nothing is estimated.
        say: told each line.
        now: seconds, from any start.

    Example:
        >>> times = iter([0.0, 0.0, 0.0, 20.0, 20.0])
        >>> stages = Stages({"sample": 10, "plan": 30}, now=lambda: next(times))
        >>> stages("sample", "sampling")
        [   0 s] 1/2 sampling; about 40 s to the end
        >>> stages("plan", "making a plan")
        [  20 s] 2/2 making a plan; about 60 s to the end
    """

    def __init__(
        self,
        expected: Mapping[str, float],
        say: Callable[[str], object] = print,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.expected, self._say, self._now = dict(expected), say, now
        self._start, self._began, self._running, self._text = now(), 0.0, "", ""
        self._factor = 1.0  # time here over the expected time, of the finished stages

    def __call__(self, stage: str, text: str) -> None:
        """A stage begins."""
        elapsed = self._now() - self._start
        before = self._sum(until=stage)
        self._factor = elapsed / before if before else 1.0
        self._running, self._text, self._began = stage, text, elapsed
        self._line(text, self._now() - self._start)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """While the block runs, a stage that takes long says that it goes on."""
        ended = threading.Event()

        def repeat() -> None:
            while not ended.wait(SILENCE):
                elapsed = self._now() - self._start
                if self._running and elapsed - self._began >= SILENCE:
                    self._line(f"still {self._text}", elapsed)

        thread = threading.Thread(target=repeat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def remaining(self, elapsed: float) -> float | None:
        """Seconds to the end; None where nothing is known, or where the stage takes longer than was expected."""
        if self._running not in self.expected:
            return None
        current = self._factor * self.expected[self._running] - (elapsed - self._began)
        later = sum(self.expected.values()) - self._sum(until=self._running) - self.expected[self._running]
        return current + self._factor * later if current > 0 else None

    def _sum(self, until: str) -> float:
        total = 0.0
        for stage, seconds in self.expected.items():
            if stage == until:
                return total
            total += seconds
        return 0.0

    def _line(self, text: str, elapsed: float) -> None:
        names = list(self.expected)
        number = f"{names.index(self._running) + 1}/{len(names)} " if self._running in names else ""
        left = self.remaining(elapsed)
        self._say(f"[{elapsed:4.0f} s] {number}{text}" + (f"; about {clock(left)} to the end" if left else ""))
