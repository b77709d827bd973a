"""Named plugins: passes, observers, metrics, solvers, adapters and recipes.

A plugin is an object with a kind and a name. An installed distribution declares its plugins as entry points,
and the built-in ones are declared the same way::

    [project.entry-points."dq_plugins.observers"]
    my-observer = "my_package.my_module:MyObserver [torchao]"   # in brackets: extras that must be installed

    [project.entry-points."dq_plugins.api"]
    version = "v1"

Code of the running process registers with the decorator `register`. Names are read from metadata when this
package is imported; code is loaded when `get` first asks for it. ``DQ_PLUGINS`` allows and denies: see
`dq_plugins.registry.rules`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, TypeVar

from dq_plugins.registry.record import API_VERSIONS, GROUPS, KINDS, Declaration, Kind, Location, Plugin, State
from dq_plugins.registry.store import Registry

__all__ = [
    "API_VERSIONS",
    "GROUPS",
    "KINDS",
    "Declaration",
    "Kind",
    "Location",
    "Plugin",
    "Registry",
    "State",
    "find",
    "get",
    "load",
    "names",
    "plugins",
    "register",
    "temporary",
    "unmatched_terms",
]

T = TypeVar("T")

_registry = Registry()

get = _registry.get
names = _registry.names
plugins = _registry.plugins
find = _registry.find
load = _registry.load
unmatched_terms = _registry.unmatched_terms


def register(
    kind: Kind, name: str, *, api_version: int = 1, requires: tuple[str, ...] = (), override: bool = False
) -> Callable[[T], T]:
    """Decorator that adds a class, function or object of this process to the registry.

    Args:
        kind: ``"pass"``, ``"observer"``, ``"metric"``, ``"solver"``, ``"adapter"`` or ``"recipe"``.
        name: the name it is asked for by; lower-case words joined by hyphens, by custom.
        api_version: the plugin API it was written for.
        requires: what must be installed to use it, as pip writes it, for example ``("torchao>=0.18",)``.
        override: take the place of whatever has this name, in this process.

    Returns:
        A decorator that gives back what it is given.

    Raises:
        RegistryError: the kind is unknown, or something else has this name and ``override`` is false.

    Example:
        >>> @register("metric", "largest-error")
        ... def largest_error(reference, output):
        ...     return float((reference - output).abs().max())
        >>> get("metric", "largest-error") is largest_error
        True
    """
    caller = sys._getframe(1)

    def add(obj: T) -> T:
        declaration = _declaration(kind, name, obj, caller, api_version, tuple(requires))
        _registry.add(declaration, obj, override=override)
        return obj

    return add


def temporary(kind: Kind, name: str, obj: T) -> AbstractContextManager[T]:
    """Put ``obj`` in place of whatever has this name until the ``with`` block ends; for tests.

    Args:
        kind: the kind of plugin.
        name: the name, taken or not.
        obj: the plugin.

    Returns:
        A context manager that gives ``obj``.

    Raises:
        RegistryError: the kind is unknown.
    """
    return _registry.temporary(_declaration(kind, name, obj, sys._getframe(1)), obj)


def _declaration(
    kind: str, name: str, obj: Any, caller: FrameType, api_version: int = 1, requires: tuple[str, ...] = ()
) -> Declaration:
    """Describe an object of this process; an instance goes by its type and the module that registers it."""
    if hasattr(obj, "__qualname__"):
        target = f"{obj.__module__}:{obj.__qualname__}"
    else:
        target = f"{caller.f_globals.get('__name__', '?')}:{type(obj).__qualname__}"
    where = Location(caller.f_code.co_filename, caller.f_lineno)
    return Declaration(kind, name, target, api_version=api_version, requires=requires, registered_at=where)
