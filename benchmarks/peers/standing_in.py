"""A denoiser that something else computes, for samplers that look at its class and config."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from dq_plugins.graph.arguments import forward_signature


def standing_in(denoiser: nn.Module, run: Callable[..., Any]) -> nn.Module:
    """A copy of ``denoiser`` that answers calls with ``run``, its arguments by name in the order of the signature."""
    other, signature = copy.copy(denoiser), forward_signature(denoiser)
    # a module as an attribute would be registered in the original
    other.forward = lambda *args, **kwargs: run(**signature.bind(*args, **kwargs).arguments)
    return other
