"""Routing by the value of t: the denoiser's class selects the group for every layer.

`attach_context` gives the denoiser a class made on the fly: a subclass of its own, of the same name, whose ``forward``
reads the timestep argument, selects, and calls the forward of the original class. Why this form and not another:

- it is traced by ``torch.compile`` and ``torch.export`` like user code, so the index is computed from the graph's own
  timestep: one graph, no recompile, no host sync (a plain forward hook breaks the graph, and an index kept in a buffer
  is folded to a constant by inductor's freezing);
- it is found through the class. Tools that wrap the forward of the instance (offloading, mixed precision, casting,
  steering) wrap it and may be taken off again, and the replicas of data parallelism run a forward of their own;
- nothing counts calls: shuffled, skipped, repeated, per-sample or per-token timesteps select by value.

Where a tool had wrapped the forward of the instance before, what it wrapped is the original class's; the call as a
whole is routed then (``__call__``), and the wrapper stays in between.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from dq_plugins.compiled import unwrap
from dq_plugins.errors import TimestepError
from dq_plugins.lookalike import Lookalike, change_class, known_lookalike, lookalike
from dq_plugins.timesteps.context import TimestepContext
from dq_plugins.timesteps.finite import guarded
from dq_plugins.timesteps.selection import INDICES, unpacked

ROUTE = "_dq_timestep_route"
"""Attribute of a routed denoiser."""


@dataclass(frozen=True)
class TimestepArgument:
    """Where a call holds the timestep.

    Attributes:
        name: of the argument; inside another one, dotted.
        position: among positional arguments; None where it is taken by name alone.
        default: what it is when the call does not have it.
        indices: the argument that says which of the timesteps each packed token has; None where there is none.
    """

    name: str
    position: int | None = None
    default: Any = None
    indices: TimestepArgument | None = None

    @classmethod
    def of(cls, forward: Callable[..., Any], name: str) -> TimestepArgument | None:
        """The argument ``name`` of a bound forward; None if it has no such argument."""
        # a wrapper that takes over what our forward says of itself (functools.update_wrapper) has its ``self`` too
        parameters = {n: each for n, each in inspect.signature(forward).parameters.items() if n != "self"}
        outer = name.partition(".")[0]
        if outer not in parameters:
            any_keyword = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
            return cls(name) if any_keyword else None
        found = parameters[outer]
        position = None if found.kind is found.KEYWORD_ONLY else list(parameters).index(outer)
        indices = cls.of(forward, name + INDICES) if name + INDICES in parameters else None
        return cls(name, position, None if found.default is found.empty else found.default, indices)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, optional: bool = False) -> Any:
        """The timestep among a call's arguments, a tensor or a number; None where it is ``optional`` and there is none.

        Raises:
            TimestepError: there is none.
        """
        outer, *path = self.name.split(".")
        if outer in kwargs:
            value = kwargs[outer]
        elif self.position is not None and self.position < len(args):
            value = args[self.position]
        else:
            value = self.default
        for part in path:
            value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
        if value is None and not optional:
            raise TimestepError(f"the denoiser was called without its timestep argument {self.name!r}")
        if self.indices is not None and isinstance(value, Tensor):
            return unpacked(value, self.indices.read(args, kwargs, optional=True))
        return value


@dataclass(frozen=True)
class Route:
    """What a routed denoiser holds.

    Attributes:
        context: what its layers hold.
        argument: the timestep among the arguments of its class's forward.
        outside: the timestep among the arguments of a call, where the forward of its class may never be reached,
            because a wrapper on the instance holds that of the original class.
    """

    context: TimestepContext
    argument: TimestepArgument
    outside: TimestepArgument | None


class Routed(Lookalike):
    """First base of the classes made on the fly."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original; routed here where a wrapper hides the class's forward."""
        route: Route | None = self.__dict__.get(ROUTE)
        if route is None or route.outside is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with route.context.select(route.outside.read(args, kwargs), self):
            return guarded(super().__call__, (), args, kwargs, route.context.non_finite)  # type: ignore[misc]


def routed_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``original`` whose forward selects; always the same one.

    An instance without a route (made by ``type(denoiser)(...)`` or ``from_config``) behaves as one of the original.
    """
    if (known := known_lookalike(original, routed_class)) is not None:
        return known
    names = tuple(inspect.signature(original.forward).parameters)[1:]  # without self

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        route: Route | None = self.__dict__.get(ROUTE)
        if route is None:
            return original.forward(self, *args, **kwargs)
        with route.context.select(route.argument.read(args, kwargs), self):
            return guarded(partial(original.forward, self), names, args, kwargs, route.context.non_finite)

    # Not functools.wraps: tools that take wrappers off follow __wrapped__, and would take this one off, too.
    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    forward.__doc__ = original.forward.__doc__
    return lookalike(original, Routed, routed_class, forward=forward)


def attach_context(denoiser: nn.Module, context: TimestepContext, argument: str) -> None:
    """Route ``denoiser`` by its timestep argument. Attaching again replaces the context.

    From then on every layer of ``denoiser`` is called, those of PyTorch's transformer encoders included.

    Args:
        denoiser: the module whose forward takes the timestep.
        context: what the layers of this denoiser hold.
        argument: name of the timestep argument.

    Raises:
        TimestepError: forward has no such argument, or the class of the denoiser allows no subclass in its place.
    """
    detach_context(denoiser)
    denoiser = unwrap(denoiser)
    _call_every_layer(denoiser)
    original = type(denoiser)
    of_class = TimestepArgument.of(original.forward.__get__(denoiser), argument)
    outside = _outside(denoiser, argument, of_class) if "forward" in vars(denoiser) else None
    if of_class is None and outside is None:
        parameters = inspect.signature(denoiser.forward).parameters
        raise TimestepError(
            f"the denoiser's forward has no argument {argument!r}; it has: {', '.join(parameters)}. "
            "Name the one that carries the timestep with timestep='...'."
        )
    try:
        if not issubclass(original, Routed):
            change_class(denoiser, routed_class(original))
    except TypeError as error:
        raise TimestepError(
            f"a {original.__name__} cannot be routed by its timestep: its class allows no subclass in its place "
            f"({error}). Build the denoiser from its Python class."
        ) from error
    object.__setattr__(denoiser, ROUTE, Route(context, of_class or outside, outside))


def _outside(denoiser: nn.Module, argument: str, of_class: TimestepArgument | None) -> TimestepArgument | None:
    """The argument among those that the instance's own forward takes; a wrapper that does not name it passes it on."""
    named = argument.partition(".")[0] in inspect.signature(denoiser.forward).parameters
    return TimestepArgument.of(denoiser.forward, argument) if named or of_class is None else of_class


def _call_every_layer(model: nn.Module) -> None:
    """Keep transformer encoders from handing the weights of their layers to one fused kernel, in evaluation mode.

    The layers would not be called, and whatever quantizes them would be skipped without a word. Results change by
    rounding alone.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # how the layer notes an activation that the fused kernel lacks
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # an input that only the fused kernel takes


def route_of(denoiser: nn.Module) -> Route | None:
    """How ``denoiser`` is routed, or None."""
    return vars(unwrap(denoiser)).get(ROUTE)


def context_of(denoiser: nn.Module) -> TimestepContext | None:
    """The context attached to ``denoiser``, or None."""
    route = route_of(denoiser)
    return route.context if route else None


def argument_of(denoiser: nn.Module) -> str | None:
    """Name of the timestep argument that an attached context reads, or None."""
    route = route_of(denoiser)
    return route.argument.name if route else None


def detach_context(denoiser: nn.Module) -> None:
    """Give ``denoiser`` its own class back; nothing happens when no context is attached.

    Wrappers that other tools put on its forward meanwhile stay, and call the original forward.
    """
    denoiser = unwrap(denoiser)
    if vars(denoiser).pop(ROUTE, None) is None:
        return
    original = type(denoiser).__dict__.get("_dq_original")
    if original is not None:  # else some tool made a subclass of ours, which without a route is as good
        change_class(denoiser, original)
