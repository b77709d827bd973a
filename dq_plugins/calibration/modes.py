"""Running a denoiser without leaving a trace on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dq_plugins.compiled import uncompiled


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, uncompiled; every submodule's own mode comes back, whatever happens inside."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), uncompiled(module):
            yield
    finally:
        for each, training in modes.items():
            each.training = training
