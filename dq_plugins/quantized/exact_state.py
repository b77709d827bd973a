"""Buffers that keep their dtype when the module around them is cast to another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Self


class ExactState(nn.Module):
    """A module some of whose buffers move to devices like all others and keep their dtype.

    Half precision would round a scale so far that a value falls on another code, and move the edge between two
    timestep groups.

    Example:
        >>> class Scaled(ExactState):
        ...     exact_state = ("scale",)
        >>> module = Scaled()
        >>> module.register_buffer("scale", torch.ones(2))
        >>> module.half().scale.dtype
        torch.float32
    """

    exact_state: tuple[str, ...] = ()
    """Names of these buffers; one may be absent or None."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: buffer for name in self.exact_state if (buffer := getattr(self, name, None)) is not None}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after: torch.Tensor = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self
