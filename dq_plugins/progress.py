"""Progress of long computations: generators yield it instead of printing, and return their result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from typing import NamedTuple, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def on_terminal() -> bool:
    """Whether somebody sees progress bars as such; in a file or a pipe they are rubbish."""
    return sys.stderr.isatty()


def clock(seconds: float) -> str:
    """A time that somebody waits: ``40 s``, ``3 min``."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class Progress(NamedTuple):
    """How far a computation is."""

    done: int
    total: int
    what: str = ""


def reported(running: Generator[T, None, R], describe: Callable[[T], Progress | None]) -> Generator[Progress, None, R]:
    """A generator's own steps as progress of what it is a part of; to be used with ``yield from``.

    Args:
        running: the part.
        describe: what a step of it means for the whole; None: nothing worth showing.

    Returns:
        (of the generator) what ``running`` returns.

    Example:
        >>> def count():
        ...     yield 1
        ...     yield 2
        ...     return "counted"
        >>> for progress in reported(count(), lambda done: Progress(done, 2)):
        ...     print(progress)
        Progress(done=1, total=2, what='')
        Progress(done=2, total=2, what='')
    """
    while True:
        try:
            step = next(running)
        except StopIteration as stop:
            return stop.value
        progress = describe(step)
        if progress is not None:
            yield progress


def finish(running: Generator[object, None, R]) -> R:
    """Run a generator to its end, and return what it returns."""
    while True:
        try:
            next(running)
        except StopIteration as stop:
            return stop.value
