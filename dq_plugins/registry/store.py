"""The registry: which plugins there are, where each stands, and loading one at first use."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from typing import Any, TypeVar

from dq_plugins.errors import MissingDependencyError, RegistryError
from dq_plugins.registry import messages
from dq_plugins.registry.discovery import discover
from dq_plugins.registry.record import API_VERSIONS, KINDS, Declaration, Plugin
from dq_plugins.registry.requirements import missing_requirements
from dq_plugins.registry.rules import VARIABLE, Rules, parse_rules

T = TypeVar("T")
Key = tuple[str, str]


class Registry:
    """Plugins by kind and name.

    Names come from metadata when the registry is made; code is loaded by the first `get`. What code of this
    process registers stands before what is installed. Every method may be called from several threads;
    loading happens outside the lock, because a module that is being imported may register plugins itself.
    """

    def __init__(
        self, declarations: Iterable[Declaration] | None = None, environ: Mapping[str, str] = os.environ
    ) -> None:
        """Read the names.

        Args:
            declarations: the installed plugins; read from package metadata by default.
            environ: where ``DQ_PLUGINS`` is looked up, at every call.
        """
        self._environ = environ
        self._lock = threading.RLock()
        self._installed: dict[Key, list[Declaration]] = {}
        for declaration in discover() if declarations is None else declarations:
            self._installed.setdefault((declaration.kind, declaration.name), []).append(declaration)
        self._registered: dict[Key, Declaration] = {}
        self._loaded: dict[Declaration, Any] = {}
        self._failures: dict[Declaration, BaseException] = {}

    def names(self, kind: str) -> list[str]:
        """Names of one kind, sorted; those that ``DQ_PLUGINS`` denies are left out.

        Raises:
            RegistryError: ``kind`` is not a kind of plugin.
        """
        messages.check_kind(kind)
        rules = self._rules()
        with self._lock:
            keys = [key for key in {*self._installed, *self._registered} if key[0] == kind]
            return sorted(name for _, name in keys if self._allowed((kind, name), rules))

    def plugins(self, kind: str | None = None) -> list[Plugin]:
        """Every plugin and where it stands, by kind and name; loads nothing.

        Args:
            kind: one of `KINDS`, or None for all.

        Raises:
            RegistryError: ``kind`` is not a kind of plugin.
        """
        if kind is not None:
            messages.check_kind(kind)
        rules = self._rules()
        with self._lock:
            keys = [key for key in {*self._installed, *self._registered} if kind in (None, key[0])]
            keys.sort(key=lambda key: (KINDS.index(key[0]), key[1]))
            return [plugin for key in keys for plugin in self._standing(key, rules)]

    def get(self, kind: str, name: str) -> Any:
        """The plugin object, loaded if this is its first use.

        Args:
            kind: one of `KINDS`.
            name: its name.

        Raises:
            RegistryError: it is unknown, denied, in conflict, of another API version, or broken.
            MissingDependencyError: a distribution it requires is not installed.
        """
        return self.load(self.find(kind, name))

    def find(self, kind: str, name: str) -> Plugin:
        """The record of a plugin that may be loaded; loads nothing.

        Arguments and errors are those of `get`. A plugin that was broken at its last use may be tried again.
        """
        messages.check_kind(kind)
        with self._lock:
            standing = self._standing((kind, name), self._rules())
        if not standing:
            raise RegistryError(messages.unknown(kind, name, {each: self.names(each) for each in KINDS}))
        plugin = next((each for each in standing if each.state != "denied"), standing[0])
        if plugin.state in ("ok", "not loaded", "broken"):
            return plugin
        if plugin.state == "missing requirement":
            raise MissingDependencyError(_cannot_be_used(plugin))
        raise RegistryError(_cannot_be_used(plugin))

    def load(self, plugin: Plugin) -> Any:
        """The object behind a record that `find` or `plugins` gave.

        Raises:
            RegistryError: its module cannot be imported or has no such attribute.
        """
        declaration = plugin.declaration
        with self._lock:
            if declaration in self._loaded:
                return self._loaded[declaration]
        try:
            loaded = _import_target(declaration)
        except (Exception, SystemExit) as error:  # the module of a third party may raise anything
            with self._lock:
                self._failures[declaration] = error
            raise RegistryError(messages.broken(declaration, error)) from error
        with self._lock:
            self._failures.pop(declaration, None)
            return self._loaded.setdefault(declaration, loaded)

    def add(self, declaration: Declaration, obj: Any, *, override: bool = False) -> None:
        """Add an object of this process.

        The same definition may be added again (a notebook cell that runs twice, a decorator on what an entry
        point names); then the newer one counts.

        Args:
            declaration: what is known about it.
            obj: the plugin.
            override: take the place of whatever has this name.

        Raises:
            RegistryError: the kind is unknown, or something else has this name and ``override`` is false.
        """
        messages.check_kind(declaration.kind)
        key = (declaration.kind, declaration.name)
        with self._lock:
            holders = self._allowed(key, self._rules())
            rivals = [holder for holder in holders if not _same_definition(holder, declaration)]
            if rivals and not override:
                raise RegistryError(messages.registered_twice(declaration, rivals))
            if holders and not rivals:  # keep whose it is
                whose = holders[0]
                declaration = replace(declaration, distribution=whose.distribution, version=whose.version)
            self._registered[key] = declaration
            self._loaded[declaration] = obj

    @contextmanager
    def temporary(self, declaration: Declaration, obj: T) -> Iterator[T]:
        """Put ``obj`` in place of whatever has this name until the ``with`` block ends."""
        messages.check_kind(declaration.kind)
        key = (declaration.kind, declaration.name)
        with self._lock:
            before = self._registered.get(key)
            self._registered[key] = declaration
            self._loaded[declaration] = obj
        try:
            yield obj
        finally:
            with self._lock:
                del self._loaded[declaration]
                if before is None:
                    self._registered.pop(key, None)
                else:
                    self._registered[key] = before

    def unmatched_terms(self) -> list[str]:
        """Terms of ``DQ_PLUGINS`` that match no plugin: misspelt, or of something not installed."""
        with self._lock:
            known = [each for many in self._installed.values() for each in many]
            known += self._registered.values()
        return [term.text for term in self._rules().terms if not any(term.matches(each) for each in known)]

    def _rules(self) -> Rules:
        return parse_rules(self._environ.get(VARIABLE, ""))

    def _candidates(self, key: Key) -> list[Declaration]:
        return [self._registered[key]] if key in self._registered else self._installed.get(key, [])

    def _allowed(self, key: Key, rules: Rules) -> list[Declaration]:
        return [each for each in self._candidates(key) if not rules.denial(each)]

    def _standing(self, key: Key, rules: Rules) -> list[Plugin]:
        """Records of everything that has this name."""
        allowed = self._allowed(key, rules)
        standing = []
        for declaration in self._candidates(key):
            if declaration not in allowed:
                standing.append(Plugin(declaration, "denied", rules.denial(declaration)))
            elif len(allowed) > 1:
                standing.append(Plugin(declaration, "conflict", messages.conflict(allowed)))
            else:
                standing.append(self._alone(declaration))
        return standing

    def _alone(self, declaration: Declaration) -> Plugin:
        """The record of a plugin that nothing denies or rivals."""
        if declaration.api_version not in API_VERSIONS:
            return Plugin(declaration, "incompatible", messages.incompatible(declaration))
        missing = missing_requirements(declaration)
        if missing:
            return Plugin(declaration, "missing requirement", missing)
        if declaration in self._loaded:
            return Plugin(declaration, "ok")
        if declaration in self._failures:
            return Plugin(declaration, "broken", messages.failure(declaration, self._failures[declaration]))
        return Plugin(declaration, "not loaded")


def _cannot_be_used(plugin: Plugin) -> str:
    who = f"{plugin.kind} {plugin.name!r} of {plugin.declaration.origin}"
    return f"the {who} cannot be used: {plugin.reason}."


def _same_definition(one: Declaration, other: Declaration) -> bool:
    """Whether both name the same definition, perhaps re-exported by a parent package."""
    packages = {declaration.module.partition(".")[0] for declaration in (one, other)}
    return len(packages) == 1 and one.attribute == other.attribute


def _import_target(declaration: Declaration) -> Any:
    """Import what an entry point names; the only place where the code of a plugin starts to run."""
    names = [*declaration.module.split("."), *declaration.attribute.split(".")]
    if not all(name.isidentifier() for name in names):
        raise ValueError("an entry point is written package.module:attribute")
    module = importlib.import_module(declaration.module)
    return reduce(getattr, declaration.attribute.split("."), module)
