"""The registry: a dict of plugins by kind and name; where each stands, and loading one at first use.

Names come from metadata when this module is imported. Threads may share it: each function changes the dict by one
assignment, and Python imports a module once. Every function raises `RegistryError` where ``kind`` is not a kind of
plugin, or the environment variable ``DQ_PLUGINS`` is malformed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from dq_plugins.errors import MissingDependencyError, RegistryError, close_matches
from dq_plugins.registry.installed import API_GROUP, discover, missing_requirements
from dq_plugins.registry.plugin import KINDS, NOT_LOADED, Kind, Plugin
from dq_plugins.registry.rules import denial, terms

API = "v1"
State = Literal["ok", "not loaded", "broken", "conflict", "incompatible", "missing requirement", "denied"]
T = TypeVar("T")


def by_name(plugins: Iterable[Plugin]) -> dict[tuple[str, str], list[Plugin]]:
    """Plugins by kind and name; a name that several distributions declare has several."""
    found: dict[tuple[str, str], list[Plugin]] = {}
    for plugin in plugins:
        found.setdefault((plugin.kind, plugin.name), []).append(plugin)
    return found


_plugins = by_name(discover())


def names(kind: str) -> list[str]:
    """Names of one kind, sorted; those that ``DQ_PLUGINS`` denies are left out."""
    return sorted({plugin.name for plugin in plugins(kind) if not denial(plugin)})


def plugins(kind: str | None = None) -> list[Plugin]:
    """Every plugin of one kind or of all, by kind and name; loads nothing."""
    if kind is not None:
        _check_kind(kind)
    keys = sorted(_plugins, key=lambda key: (KINDS.index(key[0]), key[1]))
    return [plugin for key in keys if kind in (None, key[0]) for plugin in _plugins[key]]


def status(plugin: Plugin) -> tuple[State, str]:
    """Where a plugin stands and, if it cannot be used, why and the way out; loads nothing.

    ``ok`` is loaded, here or in a trial, ``not loaded`` awaits its first use, ``broken`` may be tried again; no other
    can be used.
    """
    if denied := denial(plugin):
        return "denied", denied
    rivals = _allowed(plugin)
    if any(rival.built_in for rival in rivals) and not plugin.built_in:
        way_out = f"to use this one instead, deny that one with the environment variable DQ_PLUGINS='-{_ours(rivals)}'"
        return "conflict", f"a plugin that comes with dq-plugins has this name, and keeps it; {way_out}"
    if len(rivals) > 1 and not plugin.built_in:
        ways = " or ".join(f"'-{rival.key}'" for rival in rivals)
        way_out = f"uninstall one, or deny one with the environment variable DQ_PLUGINS={ways}"
        return "conflict", f"{_who(rivals)} provide it; {way_out}"
    if plugin.api != API:
        written = f"the entry-point group {API_GROUP!r} says that it is written for version {plugin.api}"
        way_out = "install a release of one that matches the other"
        return "incompatible", f"{written} of the plugin API, and this dq-plugins runs {API}; {way_out}"
    if missing := missing_requirements(plugin.requires):
        return "missing requirement", missing
    if plugin.failure:
        return "broken", plugin.failure
    return ("not loaded" if plugin.loaded is NOT_LOADED and not plugin.loads else "ok"), ""


def find(kind: str, name: str) -> Plugin:
    """The plugin that `get` would load; the errors are those of `get`."""
    _check_kind(kind)
    standing = [(plugin, *status(plugin)) for plugin in _plugins.get((kind, name), ())]
    if not standing:
        raise RegistryError(_unknown(kind, name))
    standing.sort(key=lambda each: (each[1] == "denied", not each[0].built_in))  # what is built in keeps its name
    plugin, state, reason = standing[0]
    if state in ("ok", "not loaded", "broken"):
        return plugin
    error = MissingDependencyError if state == "missing requirement" else RegistryError
    raise error(f"the {kind} {name!r} of {plugin.origin} cannot be used: {reason}.")


def get(kind: str, name: str) -> Any:
    """The plugin object, loaded if this is its first use.

    Raises:
        RegistryError: it is unknown, denied, in conflict, of another API version, or broken.
        MissingDependencyError: a distribution it requires is not installed.
    """
    return find(kind, name).load()


def function(kind: str, name: str) -> Callable[..., Any]:
    """`get` of a plugin that is to be called: a class or a function.

    Raises:
        RegistryError: see `get`; or it is something else.
    """
    found = get(kind, name)
    if not callable(found):
        plugin = find(kind, name)
        raise RegistryError(
            f"the {kind} {name!r} of {plugin.origin} is a {type(found).__name__}, which cannot be called: its entry "
            f"point {plugin.target} names the wrong object"
        )
    return found


def register(kind: Kind, name: str, *, requires: tuple[str, ...] = (), override: bool = False) -> Callable[[T], T]:
    """Decorator that adds a class, function or object of this process.

    The same definition may be registered again (a notebook cell that runs twice, a decorator on what an entry
    point names); then the newer one counts.

    Args:
        kind: ``"pass"``, ``"observer"``, ``"metric"``, ``"solver"``, ``"adapter"`` or ``"recipe"``.
        name: the name it is asked for by; lower-case words joined by hyphens, by custom.
        requires: what must be installed to use it, as pip writes it, for example ``("torchao>=0.18",)``.
        override: take the place of whatever has this name, in this process.

    Raises:
        RegistryError: something else has this name and ``override`` is false.

    Example:
        >>> @register("metric", "largest-error")
        ... def largest_error(reference, output):
        ...     return float((reference - output).abs().max())
        >>> get("metric", "largest-error") is largest_error
        True
    """
    _check_kind(kind)
    module = sys._getframe(1).f_globals.get("__name__", "?")

    def add(obj: T) -> T:
        plugin = Plugin.of(kind, name, obj, module)
        plugin.requires = tuple(requires)
        holders = _allowed(plugin)
        rivals = [holder for holder in holders if holder.definition != plugin.definition]
        if rivals and not override:
            raise RegistryError(
                f"the {kind} {name!r} is registered twice: by {_who([plugin])} and by {_who(rivals)}. "
                "Choose another name, or pass override=True to replace it in this process."
            )
        if holders and not rivals:  # keep whose it is
            plugin.distribution, plugin.version = holders[0].distribution, holders[0].version
        _plugins[kind, name] = [plugin]
        return obj

    return add


@contextmanager
def temporary(kind: Kind, name: str, obj: T) -> Iterator[T]:
    """Put ``obj`` in place of whatever has this name until the ``with`` block ends; for tests."""
    _check_kind(kind)
    before = _plugins.get((kind, name), [])
    _plugins[kind, name] = [Plugin.of(kind, name, obj, type(obj).__module__)]
    try:
        yield obj
    finally:
        _plugins[kind, name] = before


def unmatched_terms() -> list[str]:
    """Terms of ``DQ_PLUGINS`` that match no plugin: misspelt, or of something not installed."""
    return [term.text for term in terms() if not any(map(term.matches, plugins()))]


def _allowed(plugin: Plugin) -> list[Plugin]:
    """What has the name of ``plugin`` and is not denied."""
    return [each for each in _plugins.get((plugin.kind, plugin.name), ()) if not denial(each)]


def _ours(plugins: list[Plugin]) -> str:
    return next(plugin.key for plugin in plugins if plugin.built_in)


def _unknown(kind: str, name: str) -> str:
    known = names(kind)
    elsewhere = " and ".join(other for other in KINDS if other != kind and name in names(other))
    hint = (close_matches(name, known) or ".") + (f" There is one of kind {elsewhere}." if elsewhere else "")
    return f"there is no {kind} named {name!r}{hint} The names of kind {kind}: {', '.join(known) or 'none'}."


def _who(plugins: list[Plugin]) -> str:
    return " and ".join(f"{plugin.origin} ({plugin.target})" for plugin in plugins)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        hint = close_matches(kind, KINDS) or "."
        raise RegistryError(f"{kind!r} is not a kind of plugin{hint} The kinds are: {', '.join(KINDS)}.")
