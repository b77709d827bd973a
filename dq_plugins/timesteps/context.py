"""Routing by the value of t: one wrapper on the denoiser's forward selects the group for every layer.

`attach_context` replaces the *instance's* ``forward`` by one that reads the timestep argument, computes the group
index of every named set of groups, runs the original forward, and clears the index. Why this form and not another:

- a wrapped forward is traced by ``torch.compile`` and ``torch.export`` like user code, so the index is computed from
  the graph's own timestep: one graph, no recompile, no host sync (a plain forward hook breaks the graph, and an index
  kept in a buffer is folded to a constant by inductor's freezing);
- layers hold the small `TimestepContext`, not the denoiser, so ``copy.deepcopy`` and ``pickle`` of the denoiser carry
  a context of their own, and two denoisers in one process never meet;
- nothing counts calls: shuffled, skipped, repeated or per-sample timesteps select by value.

Index shapes: ``[1]`` when the whole batch has one timestep, ``[B]`` when every sample may have its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dq_plugins.errors import TimestepError
from dq_plugins.timesteps.fused import call_every_layer
from dq_plugins.timesteps.groups import TimestepGroups

OutOfRange = Literal["error", "nearest"]

DIFFERENT_TIMESTEPS = (
    "the samples of this batch have different timesteps, and the denoiser was told that they never have; apply the "
    "plan with uniform_timesteps=False"
)


class TimestepContext:
    """The groups of one denoiser and, while its forward runs, the selected index of each.

    Args:
        groups: named sets of groups; layers select by name.
        out_of_range: what to do with a timestep outside the calibrated range: raise, or use the nearest group.
        uniform: every call has one timestep for the whole batch, as sampling has. A denoiser that takes one timestep
            per sample then selects one set of parameters in a compiled graph too, which is faster; a call with
            different timesteps is an error.

    Attributes:
        timestep: of the call that runs, ``[1]`` or ``[B]``.
        traced: whether the selection is part of a graph that is being compiled, with the layers that read it.
        per_call: what layers computed from the timestep for others to use during the same call.
    """

    def __init__(
        self, groups: Mapping[str, TimestepGroups], out_of_range: OutOfRange = "error", *, uniform: bool = False
    ) -> None:
        if out_of_range not in ("error", "nearest"):
            raise TimestepError(f"out_of_range is 'error' or 'nearest', got {out_of_range!r}")
        self.groups = dict(groups)
        self.out_of_range = out_of_range
        self.uniform = uniform
        self.timestep: Tensor | None = None
        self.traced = False
        self.per_call: dict[Hashable, Any] = {}
        self._index: dict[str, Tensor] | None = None

    def select(self, timestep: Tensor | float) -> None:
        """Select the groups of ``timestep`` (number, 0-d, ``[1]`` or ``[B]``).

        Raises:
            TimestepError: wrong shape, not finite, or outside the calibrated range.
        """
        t = timestep if isinstance(timestep, Tensor) else torch.tensor([float(timestep)])
        if t.dim() > 1:
            raise TimestepError(f"a timestep is a number, 0-d or one per sample; got shape {tuple(t.shape)}")
        t = t.reshape(-1)
        # On an accelerator reading a value would stall the device at every step, and in a compiled graph there is
        # none to read: only eager code on the host looks at the values.
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            t = self._checked(t)
        if self.uniform and t.numel() > 1:
            # checked by the device when it gets there: no stall, and it is part of a compiled graph
            torch._assert_async((t == t[0]).all(), DIFFERENT_TIMESTEPS)
            t = t[:1]
        self.timestep = t
        self.traced = torch.compiler.is_compiling()
        self.per_call = {}
        self._index = {name: groups.index(t) for name, groups in self.groups.items()}

    def _checked(self, t: Tensor) -> Tensor:
        """``t``, or one entry of it when all samples have the same: one set of parameters is then enough."""
        smallest, largest = (float(v) for v in t.float().aminmax())
        if self.out_of_range == "error":
            for groups in self.groups.values():
                groups.check(smallest, largest)
        return t[:1] if smallest == largest else t

    def clear(self) -> None:
        """Forget the selection: a layer called outside the denoiser's forward then says so."""
        self.timestep = None
        self.per_call = {}
        self._index = None

    def index(self, name: str) -> Tensor:
        """Selected group of the named groups: int64 ``[1]`` or ``[B]``.

        Raises:
            TimestepError: no forward of the denoiser is running, or the name is unknown.
        """
        if self._index is None:
            raise TimestepError(
                "a layer with timestep groups was called outside the denoiser's forward, so no timestep is known. "
                "Call the denoiser itself, or select one first with context_of(denoiser).select(t)."
            )
        if name not in self._index:
            raise TimestepError(f"no timestep groups named {name!r}; there are: {', '.join(self._index)}")
        return self._index[name]


class RoutedForward:
    """The denoiser's forward with routing; its bound method ``call`` becomes the instance's ``forward``."""

    def __init__(self, inner: Callable[..., Any], argument: str, context: TimestepContext) -> None:
        signature = inspect.signature(inner)
        if argument not in signature.parameters:
            raise TimestepError(
                f"the denoiser's forward has no argument {argument!r}; it has: {', '.join(signature.parameters)}. "
                "Name the one that carries the timestep with timestep='...'."
            )
        self.inner = inner
        self.argument = argument
        self.position = list(signature.parameters).index(argument)
        self.default = signature.parameters[argument].default
        self.context = context

    def timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | float:
        """The timestep among a call's arguments."""
        if self.argument in kwargs:
            value = kwargs[self.argument]
        elif self.position < len(args):
            value = args[self.position]
        else:
            value = None if self.default is inspect.Parameter.empty else self.default
        if value is None:
            raise TimestepError(f"the denoiser was called without its timestep argument {self.argument!r}")
        return value

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Select the groups, run the original forward, forget the selection."""
        self.context.select(self.timestep(args, kwargs))
        output = self.inner(*args, **kwargs)
        self.context.clear()
        return output


def attach_context(denoiser: nn.Module, context: TimestepContext, argument: str) -> None:
    """Route ``denoiser`` by its timestep argument. Attaching again replaces the context.

    From then on every layer of ``denoiser`` is called, those of PyTorch's transformer encoders included.

    Args:
        denoiser: the module whose forward takes the timestep.
        context: what the layers of this denoiser hold.
        argument: name of the timestep argument.

    Raises:
        TimestepError: forward has no such argument.
    """
    detach_context(denoiser)
    call_every_layer(denoiser)
    object.__setattr__(denoiser, "forward", RoutedForward(denoiser.forward, argument, context).call)


def _routed(denoiser: nn.Module) -> RoutedForward | None:
    owner = getattr(denoiser.__dict__.get("forward"), "__self__", None)
    return owner if isinstance(owner, RoutedForward) else None


def context_of(denoiser: nn.Module) -> TimestepContext | None:
    """The context attached to ``denoiser``, or None."""
    routed = _routed(denoiser)
    return routed.context if routed else None


def argument_of(denoiser: nn.Module) -> str | None:
    """Name of the timestep argument that an attached context reads, or None."""
    routed = _routed(denoiser)
    return routed.argument if routed else None


def detach_context(denoiser: nn.Module) -> None:
    """Restore the forward that `attach_context` found; nothing happens when none is attached."""
    routed = _routed(denoiser)
    if routed is None:
        return
    if getattr(routed.inner, "__func__", None) is type(denoiser).forward:
        object.__delattr__(denoiser, "forward")
    else:  # some other tool had wrapped the forward before us
        object.__setattr__(denoiser, "forward", routed.inner)
