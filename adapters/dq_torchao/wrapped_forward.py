"""Layers whose ``forward`` another tool has replaced on the instance: what the replacement ends up running.

Tools for offloading, casting and steering set ``layer.forward`` to a function that calls the forward they found: a
method bound to the layer, of the class that it had then. Quantizing a layer gives it another class, and the method
that the tool holds would go on running in floating point without a word.

What a replacement holds is found by following it the way Python would: closures, default values, `functools.partial`,
methods, and attributes whose names occur in the code. Where the method is an attribute it can be exchanged, as the
tools do themselves when one of several is taken off; where it is captured in a closure, it cannot.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

UNREACHABLE = (
    "its forward was replaced on the instance by {name}, which does not lead to the quantized layer's own; quantize "
    "first, then wrap the forward"
)

FORWARDS = ("forward", "_forward_of_class")


@dataclass(frozen=True)
class Held:
    """A forward of a layer that something holds.

    Attributes:
        method: bound to the layer.
        attributes: the dictionary it is an attribute in; None where it cannot be exchanged.
        key: its name there.
    """

    method: MethodType
    attributes: dict[str, Any] | None = None
    key: str = ""


def unreachable(layer: nn.Module, *, after_exchange: bool = False) -> str:
    """Why the forward of the layer's class is not what runs when the layer is called; empty when it is.

    Args:
        layer: the layer.
        after_exchange: whether to ask for what `exchange` would leave, for a class that the layer is to get.
    """
    if "forward" not in vars(layer):
        return ""
    held = held_forwards(layer)
    own = [h for h in held if h.method.__func__ in (type(layer).forward, _forward_of_class)]
    fixed = after_exchange and any(h.attributes is None for h in held)
    if held and len(own) == len(held) and not fixed:
        return ""
    forward = vars(layer)["forward"]
    return UNREACHABLE.format(name=getattr(forward, "__qualname__", None) or f"a {type(forward).__name__}")


def exchange(layer: nn.Module, former: type[nn.Module]) -> None:
    """Have replacements of the layer's forward run that of its class where they run that of a former one."""
    for held in held_forwards(layer):
        if held.attributes is not None and held.method.__func__ is former.forward:
            held.attributes[held.key] = MethodType(_forward_of_class, layer)


def _forward_of_class(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def unwrapped_copy(layer: nn.Module) -> nn.Module:
    """A copy of ``layer`` that runs the forward of its class; it may be quantized, and shares memory until then."""
    copied = copy.copy(layer)
    vars(copied).update({name: value.copy() for name, value in vars(layer).items() if isinstance(value, dict)})
    vars(copied).pop("forward", None)
    return copied


def held_forwards(layer: nn.Module) -> list[Held]:
    """Every forward of ``layer`` that the replacement on the instance leads to."""
    return list(_follow(vars(layer)["forward"], layer, frozenset(), set())) if "forward" in vars(layer) else []


def _follow(value: Any, layer: nn.Module, names: frozenset[str], seen: set[int]) -> Iterator[Held]:
    """Forwards of ``layer`` in ``value``, which code that uses ``names`` has at hand."""
    if isinstance(value, MethodType) and value.__self__ is layer and value.__name__ in FORWARDS:
        yield Held(value)
        return
    if value is None or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, MethodType):
        names = _names(value.__func__.__code__) if isinstance(value.__func__, FunctionType) else names
        parts = [value.__func__] if value.__self__ is layer else [value.__func__, value.__self__]
    elif isinstance(value, functools.partial):
        names |= _names(value.func.__code__) if isinstance(value.func, FunctionType) else frozenset()
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, FunctionType):
        names = _names(value.__code__)
        parts = [*_captured(value, names)]
        yield from _attributes(layer, layer, names, seen)
    else:
        parts = []
        if not isinstance(value, type) and value is not layer:
            yield from _attributes(value, layer, names, seen)
    for part in parts:
        yield from _follow(part, layer, names, seen)


def _attributes(owner: Any, layer: nn.Module, names: frozenset[str], seen: set[int]) -> Iterator[Held]:
    attributes = getattr(owner, "__dict__", {})
    for name in names & attributes.keys():
        if owner is layer and name == "forward":
            continue  # where we came from
        for held in _follow(attributes[name], layer, names, seen):
            yield Held(held.method, attributes, name) if held.method is attributes[name] else held


def _captured(function: FunctionType, names: frozenset[str]) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from (v for n in names if isinstance(v := function.__globals__.get(n), MethodType))


def _names(code: CodeType) -> frozenset[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)
