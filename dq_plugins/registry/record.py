"""What is known about a plugin: its declaration (metadata only) and its present state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["pass", "observer", "metric", "solver", "adapter", "recipe"]
"""The six kinds of plugin."""

GROUPS: dict[str, str] = {
    "pass": "dq_plugins.passes",
    "observer": "dq_plugins.observers",
    "metric": "dq_plugins.metrics",
    "solver": "dq_plugins.solvers",
    "adapter": "dq_plugins.adapters",
    "recipe": "dq_plugins.recipe.builtin",
}
"""Entry-point group of every kind."""

KINDS: tuple[str, ...] = tuple(GROUPS)
"""Every kind, in the order in which lists show them."""

API_GROUP = "dq_plugins.api"
"""Entry-point group in which a distribution declares the plugin API it was written for."""

API_VERSIONS: frozenset[int] = frozenset({1})
"""Plugin API versions that this release can run."""

BUILT_IN = "dq-plugins"
"""The distribution whose plugins are the built-in ones."""

State = Literal["ok", "not loaded", "broken", "conflict", "incompatible", "missing requirement", "denied"]
"""Where a plugin stands: ``ok`` is loaded, ``not loaded`` awaits its first use, no other can be used."""


class Location(NamedTuple):
    """Where a plugin is written.

    Attributes:
        file: path of the source file, None when there is none (a compiled module, a missing one).
        line: first line of the definition, counted from 1, None when it is unknown.
    """

    file: str | None
    line: int | None

    def __str__(self) -> str:
        """``file:line``, ``file``, or ``-``."""
        if self.file is None:
            return "-"
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True, eq=False)
class Declaration:
    """What a plugin says about itself before any of its code runs; compared by identity.

    Attributes:
        kind: one of `KINDS`.
        name: the name it is asked for by.
        target: ``package.module:attribute``.
        distribution: the distribution that declares it; None when code of this process registered it.
        version: version of that distribution.
        api_version: the plugin API it was written for; None when the declaration cannot be read.
        extras: extras of ``distribution`` that must be installed (the brackets of an entry point).
        requires: requirements (PEP 508) that must be installed, from ``register(requires=...)``.
        registered_at: where ``register`` or ``temporary`` was called; None for an entry point.
    """

    kind: str
    name: str
    target: str
    distribution: str | None = None
    version: str | None = None
    api_version: int | None = 1
    extras: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    registered_at: Location | None = None

    @property
    def built_in(self) -> bool:
        """Whether it comes with dq-plugins itself."""
        return self.distribution == BUILT_IN

    @property
    def module(self) -> str:
        """The module part of ``target``."""
        return self.target.partition(":")[0].strip()

    @property
    def attribute(self) -> str:
        """The attribute part of ``target``, dotted when nested."""
        return self.target.partition(":")[2].strip()

    @property
    def origin(self) -> str:
        """Who provides it, as messages name it."""
        if self.distribution is None:
            return f"module {self.module!r} of this process"
        return f"distribution {self.distribution!r} {self.version}"


@dataclass(frozen=True)
class Plugin:
    """One line of ``dq-plugins list``: a declaration and what became of it.

    Attributes:
        declaration: what the plugin says about itself.
        state: where it stands.
        reason: why it cannot be used, with the way out; empty when it can.
    """

    declaration: Declaration
    state: State
    reason: str = ""

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return self.declaration.kind

    @property
    def name(self) -> str:
        """The name it is asked for by."""
        return self.declaration.name

    @property
    def distribution(self) -> str | None:
        """The distribution that declares it; None when code of this process registered it."""
        return self.declaration.distribution

    @property
    def version(self) -> str | None:
        """Version of the distribution."""
        return self.declaration.version

    @property
    def location(self) -> Location:
        """File and line of the definition, found without importing anything."""
        from dq_plugins.registry.location import locate

        return self.declaration.registered_at or locate(self.declaration.module, self.declaration.attribute)

    def as_dict(self) -> dict[str, str | int | None]:
        """The record as JSON-ready data, as ``dq-plugins list --json`` prints it."""
        file, line = self.location
        return {
            "kind": self.kind,
            "name": self.name,
            "distribution": self.distribution,
            "version": self.version,
            "target": self.declaration.target,
            "file": file,
            "line": line,
            "state": self.state,
            "reason": self.reason,
        }
