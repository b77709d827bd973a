"""diffusers itself, without the messages that its import draws from other libraries, and without progress bars.

Importing a model of diffusers 0.42 with torchao 0.18 installed reports GPU kernels that fail to load on other machines,
tensor classes that moved, and a deprecated registration. None of it concerns a model that is built or sampled here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from dq_plugins.quiet import loggers_at

NOISY = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


def diffusers_attribute(name: str) -> Any:
    """An attribute of the package diffusers, which it imports at first use; None where it has none of that name."""
    with loggers_at(logging.ERROR, NOISY):
        import diffusers

        return getattr(diffusers, name, None)


@contextmanager
def loading_bars(*, shown: bool) -> Iterator[None]:
    """Leave the bars of diffusers and transformers as they are, or hide them; what was set before comes back."""
    installed = [] if shown else [name for name in ("diffusers", "transformers") if find_spec(name) is not None]
    settings = [import_module(f"{name}.utils.logging") for name in installed]
    hidden = [setting for setting in settings if setting.is_progress_bar_enabled()]
    for setting in hidden:
        setting.disable_progress_bar()
    try:
        yield
    finally:
        for setting in hidden:
            setting.enable_progress_bar()
