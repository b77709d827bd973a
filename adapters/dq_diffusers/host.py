"""diffusers itself, imported without the messages that its import draws from other libraries.

Importing a model of diffusers 0.42 with torchao 0.18 installed reports GPU kernels that fail to load on other machines,
tensor classes that moved, and a deprecated registration. None of it concerns a model that is built or sampled here.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

_NOISY = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


def diffusers_attribute(name: str) -> Any:
    """An attribute of the package diffusers, which it imports at first use; None where it has none of that name."""
    with _silenced(_NOISY):
        import diffusers

        return getattr(diffusers, name, None)


@contextlib.contextmanager
def _silenced(names: tuple[str, ...]) -> Iterator[None]:
    """Let only errors of these loggers through for a moment."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
