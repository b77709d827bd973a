"""The progress bars that diffusers and transformers show while they load, off for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

LIBRARIES = ("diffusers", "transformers")


@contextmanager
def loading_bars(*, shown: bool) -> Iterator[None]:
    """Leave the bars as they are, or hide them; what was set before comes back afterwards."""
    installed = [] if shown else [name for name in LIBRARIES if find_spec(name) is not None]
    settings = [import_module(f"{name}.utils.logging") for name in installed]
    hidden = [setting for setting in settings if setting.is_progress_bar_enabled()]
    for setting in hidden:
        setting.disable_progress_bar()
    try:
        yield
    finally:
        for setting in hidden:
            setting.enable_progress_bar()
