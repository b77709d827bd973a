"""One recorded denoiser call, and how a call's arguments and timestep are read.

Shapes: ``B`` samples in the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dq_plugins.errors import CalibrationError, TimestepError
from dq_plugins.graph.arguments import map_leaves, named_leaves, tensors_of, value_of
from dq_plugins.timesteps import by_sample_or_token, unpacked
from dq_plugins.timesteps.selection import INDICES

GOLDEN = (5**0.5 - 1) / 2
"""The fractional parts of its multiples, and of the multiples of these, spread evenly over [0, 1)."""


@dataclass(frozen=True)
class Call:
    """One full-precision denoiser call.

    Attributes:
        index: position of the call in the recording.
        timestep: what the denoiser was told, as a tensor: 0-d, ``[1]``, ``[B]``, or ``[B, ...]`` for one per token
            or frame.
        kwargs: its arguments, by name, nested as they were given; ``denoiser(**call.kwargs)`` repeats the call.
        output: first tensor of its output.
    """

    index: int
    timestep: Tensor
    kwargs: dict[str, Any]
    output: Tensor

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments flattened by path: ``{"sample": ..., "added_cond_kwargs.time_ids": ...}``."""
        return dict(named_leaves(self.kwargs))

    def to(self, device: torch.device | str) -> Call:
        """The call with its tensors on ``device``."""
        return self._mapped(lambda tensor: tensor.to(device))

    def rows(self, index: Tensor, batch: int) -> Call:
        """The call restricted to some of its ``batch`` samples.

        Every tensor whose first dimension has the size of the batch is taken to hold one entry per sample.
        """
        return self._mapped(lambda x: x[index] if x.dim() and x.shape[0] == batch else x)

    def some(self, count: int) -> Call:
        """The call with at most ``count`` of its samples, evenly over the batch: of a guided one, from both halves.

        Other samples in every call, so that several calls see all images. Left whole where not every tensor among its
        arguments has an entry for each sample.
        """
        batch = len(self.output)
        tensors = [x for x in self.inputs.values() if isinstance(x, Tensor) and x.numel() > 1]
        if batch <= count or any(not x.dim() or x.shape[0] != batch for x in tensors):
            return self
        first = int(self.index * GOLDEN % 1 * batch)  # all samples in turn, also of every n-th call
        return self.rows((torch.arange(count) * batch // count + first).remainder(batch).sort().values, batch)

    def branches(self, argument: str) -> int:
        """Rows that an image has: 2 where both halves of the batch hold the same samples (classifier-free guidance).

        Args:
            argument: name of the denoiser's sample argument.
        """
        sample = self.kwargs[argument]
        half = len(sample) // 2
        return 2 if len(sample) % 2 == 0 and torch.equal(sample[:half], sample[half:]) else 1

    def run(self, denoiser: nn.Module) -> Tensor:
        """First tensor of ``denoiser``'s output for these arguments, computed on the denoiser's device."""
        weight = next(denoiser.parameters(), None)
        call = self if weight is None else self.to(weight.device)
        return first_tensor(denoiser(**call.kwargs))

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Call:
        def leaf(_: str, value: Any) -> Any:
            return function(value) if isinstance(value, Tensor) else value

        kwargs = map_leaves(self.kwargs, leaf)
        return Call(self.index, function(self.timestep), kwargs, function(self.output))


def first_tensor(output: Any) -> Tensor:
    """The first tensor of a denoiser's output: the output itself, or the first in a tuple, dictionary or dataclass.

    Raises:
        CalibrationError: there is none.
    """
    found = next(tensors_of(output), None)
    if found is None:
        raise CalibrationError(
            f"the denoiser returned a {type(output).__name__} without a tensor in it; expected a tensor, or a "
            "tuple, dictionary or dataclass whose first tensor is the prediction"
        )
    return found


def bind(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name; those left at their default are left out.

    Raises:
        CalibrationError: an argument has no name of its own (``*args``, or positional-only).
    """
    bound = signature.bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise CalibrationError(
                f"the denoiser was called with the positional argument {name!r}, which has no keyword to record it "
                f"under (signature: {signature}). Wrap the denoiser in a module whose forward names its arguments."
            )
        else:
            named[name] = value
    return named


def timestep_of(arguments: Mapping[str, Any], argument: str) -> Tensor:
    """The timestep among the arguments of a call: `timestep_tensor`, one for each of packed tokens."""
    found = timestep_tensor(value_of(arguments, argument), argument)
    return unpacked(found, value_of(arguments, argument + INDICES))


def timestep_tensor(value: Any, argument: str) -> Tensor:
    """A timestep as a tensor: 0-d, ``[1]``, ``[B]`` or ``[B, ...]``; numbers become 0-d int64 or float64.

    Raises:
        TimestepError: it is missing, of another type or shape, or not finite.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int | float) and not isinstance(value, bool):
        whole = isinstance(value, int) and abs(value) < 1 << 63
        value = torch.tensor(value, dtype=torch.int64) if whole else _float_tensor(value)
    if not isinstance(value, Tensor) or value.numel() == 0 or value.is_complex():
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TimestepError(
            f"the denoiser was called with {argument}={found}; a timestep is a number, or a tensor of shape [], [1], "
            "[batch] or [batch, tokens]"
        )
    if not bool(torch.isfinite(value.double()).all()):  # not every dtype can say what is finite
        raise TimestepError(f"the denoiser was called with a timestep that is not finite: {argument}={value.tolist()}")
    return value.detach()


def _float_tensor(value: float) -> Tensor:
    try:
        return torch.tensor(float(value), dtype=torch.float64)
    except OverflowError:
        return torch.tensor(torch.inf, dtype=torch.float64)  # which is refused


def timestep_values(timestep: Tensor) -> list[float]:
    """Values of a timestep: one when the whole batch shares it, else one per sample, the largest of its tokens'."""
    found = by_sample_or_token(timestep)
    values = [float(v) for v in (found.amax(1) if found.dim() > 1 else found).tolist()]
    return values[:1] if len(set(values)) == 1 else values


def token_timesteps(timestep: Tensor) -> list[float]:
    """Distinct values of a timestep, ascending, where tokens of one sample have different ones; else none."""
    found = by_sample_or_token(timestep)
    if found.dim() < 2 or bool((found == found[:, :1]).all()):
        return []
    return sorted({float(v) for v in found.reshape(-1).tolist()})
