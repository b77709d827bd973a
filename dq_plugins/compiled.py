"""Running a denoiser as it is written and without leaving a trace on it, whatever ``torch.compile`` has done to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def unwrap(denoiser: nn.Module) -> nn.Module:
    """The module itself, where ``torch.compile`` has put a wrapper around it."""
    inner = getattr(denoiser, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else denoiser


@contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Modules that were compiled in place (``module.compile()``) run as they are written.

    A compiler would trace hooks that come and go, and compile the module anew for every one of them.
    """
    compiled = {each: call for each in module.modules() if (call := each._compiled_call_impl) is not None}
    for each in compiled:
        each._compiled_call_impl = None
    try:
        yield
    finally:
        for each, call in compiled.items():
            each._compiled_call_impl = call


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
