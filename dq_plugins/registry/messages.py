"""What the registry says when a plugin cannot be used; each text names the culprit and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from dq_plugins.errors import RegistryError
from dq_plugins.registry.record import API_GROUP, API_VERSIONS, KINDS, Declaration
from dq_plugins.registry.rules import VARIABLE


def check_kind(kind: str) -> None:
    """Raise `RegistryError` unless ``kind`` is a kind of plugin."""
    if kind not in KINDS:
        hint = close_matches(kind, KINDS) or "."
        raise RegistryError(f"{kind!r} is not a kind of plugin{hint} The kinds are: {', '.join(KINDS)}.")


def close_matches(word: str, known: Sequence[str]) -> str:
    """``"; did you mean 'a' or 'b'?"``, or the empty string if nothing is close."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(match) for match in close)}?" if close else ""


def unknown(kind: str, name: str, names: dict[str, list[str]]) -> str:
    """No plugin has this name.

    Args:
        kind: the kind that was asked for.
        name: the name that was asked for.
        names: the names that exist, by kind.
    """
    hint = close_matches(name, names[kind]) or "."
    elsewhere = [other for other in KINDS if other != kind and name in names[other]]
    if elsewhere:
        hint += f" There is one of kind {' and '.join(elsewhere)}."
    listed = ", ".join(names[kind]) or "none is installed"
    return f"there is no {kind} named {name!r}{hint} The names of kind {kind}: {listed}."


def conflict(rivals: Sequence[Declaration]) -> str:
    """Several distributions declare the same name."""
    first = rivals[0]
    who = " and ".join(f"{rival.origin} ({rival.target})" for rival in rivals)
    ways = " or ".join(f"'-{first.kind}:{first.name}@{rival.distribution}'" for rival in rivals)
    return f"{who} provide it; uninstall one, or deny one with the environment variable {VARIABLE}={ways}"


def registered_twice(new: Declaration, old: Sequence[Declaration]) -> str:
    """Code of this process registers a name that something else has."""
    who = " and ".join(f"{each.origin} ({each.target})" for each in old)
    return (
        f"the {new.kind} {new.name!r} is registered twice: by {new.origin} ({new.target}) and by {who}. "
        "Choose another name, or pass override=True to replace it in this process."
    )


def incompatible(declaration: Declaration) -> str:
    """The plugin was written for another plugin API."""
    ours = ", ".join(f"v{version}" for version in sorted(API_VERSIONS))
    if declaration.api_version is None:
        return f"its version in the entry-point group {API_GROUP!r} cannot be read; this release runs {ours}"
    return (
        f"it is written for version v{declaration.api_version} of the plugin API and this dq-plugins "
        f"runs {ours}; install a release of one that matches the other"
    )


def failure(declaration: Declaration, error: BaseException) -> str:
    """Loading the plugin raised."""
    what = " ".join(str(error).split()) or "no message"
    return f"loading {declaration.target} raised {type(error).__name__}: {what}"


def broken(declaration: Declaration, error: BaseException) -> str:
    """The paragraph for a plugin whose loading raised."""
    term = f"-{declaration.kind}:{declaration.name}@{declaration.distribution}"
    return (
        f"the {declaration.kind} {declaration.name!r} of {declaration.origin} is broken: "
        f"{failure(declaration, error)}. "
        f"Mend or uninstall it, or deny it with the environment variable {VARIABLE}='{term}'."
    )
