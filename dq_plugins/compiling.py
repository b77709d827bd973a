"""A line that says that a compiler works: the first call of a compiled denoiser takes a minute or more, in silence."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch._dynamo.utils import counters
from tqdm.auto import tqdm

from dq_plugins.progress import on_terminal

EVERY = 0.5
"""Seconds between two looks."""


@contextmanager
def compiling(what: str = "compiling", *, progress: bool | None = None) -> Iterator[None]:
    """Show how long the block has taken, and how many graphs are compiled, until it ends.

    Args:
        what: stands before it.
        progress: whether to show it; None: on a terminal.

    Example::

        compiled = torch.compile(denoiser)
        with compiling("compiling the denoiser"):
            compiled(**inputs)
    """
    before, ended = counters["stats"]["unique_graphs"], threading.Event()
    shown = on_terminal() if progress is None else progress
    with tqdm(desc=what, bar_format="{desc}: {elapsed}{postfix}", disable=not shown, leave=False) as line:

        def tick() -> None:
            while not ended.wait(EVERY):
                graphs = counters["stats"]["unique_graphs"] - before
                line.set_postfix_str(f"{graphs} graph{'' if graphs == 1 else 's'} compiled")

        watching = threading.Thread(target=tick, name="compiling", daemon=True)
        if shown:
            watching.start()
        try:
            yield
        finally:
            ended.set()
            if shown:
                watching.join()
