"""Messages of other libraries, silenced for a moment: where they are about code that the user did not write."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def loggers_at(level: int, names: Iterable[str]) -> Iterator[None]:
    """Let the named loggers say only what is of ``level`` or above.

    Args:
        level: such as ``logging.ERROR``.
        names: of the loggers; each has its own level back afterwards.
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
