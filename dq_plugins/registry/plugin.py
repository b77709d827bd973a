"""A plugin: what its metadata says, where it is written, and its code once that is loaded."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dq_plugins.errors import RegistryError

Kind = Literal["pass", "observer", "metric", "solver", "adapter", "recipe"]
GROUPS = {
    "pass": "dq_plugins.passes", "observer": "dq_plugins.observers", "metric": "dq_plugins.metrics",
    "solver": "dq_plugins.solvers", "adapter": "dq_plugins.adapters", "recipe": "dq_plugins.recipes",
}  # fmt: skip
"""Entry-point group of every kind, in the order in which lists show them."""
KINDS: tuple[str, ...] = tuple(GROUPS)
NOT_LOADED: Any = object()


class Location(NamedTuple):
    """The file a plugin is written in, and the line of its definition; each None where it is unknown."""

    file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        return ":".join(str(part) for part in self if part is not None) or "-"


@dataclass(eq=False)
class Plugin:
    """What a plugin says about itself before any of its code runs, and what loading it gave.

    Attributes:
        kind: one of `KINDS`.
        name: the name it is asked for by.
        target: ``package.module:attribute``.
        distribution: the distribution that declares it; None when code of this process registered it.
        version: version of that distribution.
        api: version of the plugin API it is written for.
        requires: requirements, as pip writes them, that must be met before it is loaded.
        loaded: the object, `NOT_LOADED` before its first use.
        failure: what its last loading raised, in one line; empty if nothing.
        loads: whether it has loaded in a process of its own, see `dq_plugins.registry.trial`.
    """

    kind: str
    name: str
    target: str
    distribution: str | None = None
    version: str | None = None
    api: str = "v1"
    requires: tuple[str, ...] = ()
    loaded: Any = NOT_LOADED
    failure: str = ""
    loads: bool = False

    @classmethod
    def of(cls, kind: str, name: str, obj: Any, module: str) -> Plugin:
        """An object of this process; an instance goes by its type and the module that registers it."""
        known = hasattr(obj, "__qualname__")
        target = f"{obj.__module__}:{obj.__qualname__}" if known else f"{module}:{type(obj).__qualname__}"
        return cls(kind, name, target, loaded=obj)

    @property
    def built_in(self) -> bool:
        """Whether it comes with dq-plugins itself."""
        return self.distribution == "dq-plugins"

    @property
    def key(self) -> str:
        """``kind:name@distribution``, what a term of ``DQ_PLUGINS`` is matched against."""
        return f"{self.kind}:{self.name}@{self.distribution or ''}"

    @property
    def definition(self) -> tuple[str, str]:
        """Top package and attribute: equal for a definition and its re-export by a parent package."""
        module, _, attribute = self.target.partition(":")
        return module.partition(".")[0], attribute

    @property
    def origin(self) -> str:
        """Who provides it, as messages name it."""
        if self.distribution is None:
            return f"module {self.target.partition(':')[0]!r} of this process"
        return f"distribution {self.distribution!r} {self.version}"

    @property
    def location(self) -> Location:
        """File and line of the definition, found without importing anything."""
        try:
            return locate(self.target)
        except Exception:  # import hooks of others, unreadable files, targets that are none
            return Location()

    @property
    def summary(self) -> str:
        """One line of what it does, as its definition says, found without importing anything; empty if it is silent."""
        return summary_at(self.location, self.target.partition(":")[2]).replace("``", "")

    def load(self) -> Any:
        """The object; imported at the first use, and tried again after a failure.

        Raises:
            RegistryError: its module cannot be imported or has no such attribute.
        """
        if self.loaded is NOT_LOADED:
            try:
                self.loaded, self.failure = _import(self.target), ""
            except (Exception, SystemExit) as error:  # the module of a third party may raise anything
                what = " ".join(str(error).split()) or "no message"
                self.failure = f"loading {self.target} raised {type(error).__name__}: {what}"
                raise RegistryError(
                    f"the {self.kind} {self.name!r} of {self.origin} is broken: {self.failure}. Mend or uninstall it, "
                    f"or deny it with the environment variable DQ_PLUGINS='-{self.key}'."
                ) from error
        return self.loaded


def _import(target: str) -> Any:
    if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", target):
        raise ValueError("an entry point is written package.module:attribute")
    module, attribute = target.split(":")
    return reduce(getattr, attribute.split("."), importlib.import_module(module))


def locate(target: str) -> Location:
    """Where ``package.module:attribute`` is written, found by looking at files: nothing is imported."""
    module, _, attribute = target.partition(":")
    loaded = getattr(sys.modules.get(module), "__file__", None)
    files = [Path(loaded)] if loaded else list(_files(*module.split(".")))
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return Location()
    name = re.escape(attribute.partition(".")[0])
    binds = re.compile(rf"(?:async def|def|class) {name}\b|{name}\s*[:=]|(?:from .+ )?import .*\b{name}\b")
    text = file.read_text("utf-8", errors="replace")
    lines = [number for number, line in enumerate(text.splitlines(), 1) if binds.match(line)]
    return Location(str(file), lines[-1] if lines else None)  # the last one to bind the name counts


def summary_at(location: Location, attribute: str) -> str:
    """First line of the docstring of a class or function; of an object, the second text it is made from.

    A recipe is such an object: ``Recipe("fast", "what it does", ...)``.
    """
    try:
        tree = ast.parse(Path(location.file or "").read_text("utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError):  # a third party's file may hold anything
        return ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == attribute:
            return (ast.get_docstring(node) or "").partition("\n")[0].rstrip(".")
        if isinstance(node, ast.Assign) and any(getattr(each, "id", "") == attribute for each in node.targets):
            given = node.value.args if isinstance(node.value, ast.Call) else []
            texts = [each.value for each in given if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            return texts[1] if len(texts) > 1 else ""
    return ""


def _files(top: str, *rest: str) -> Iterator[Path]:
    """Files that Python would read for a module that is not loaded; some may not exist."""
    try:
        spec = importlib.util.find_spec(top)  # of "a.b" it would import "a"
    except (ImportError, ValueError):  # ValueError: a module made by hand, without a spec
        return
    if spec is not None and not rest:
        yield Path(spec.origin or "")
    for folder in (spec and rest and spec.submodule_search_locations) or ():
        yield Path(folder, *rest).with_suffix(".py")
        yield Path(folder, *rest, "__init__.py")
