"""Read the names of every installed plugin from package metadata; no plugin code runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, EntryPoint, distributions

from packaging.utils import canonicalize_name

from dq_plugins.registry.record import API_GROUP, GROUPS, Declaration

_KIND_OF_GROUP = {group: kind for kind, group in GROUPS.items()}
_API = re.compile(r"v(\d+)")
_EXTRAS = re.compile(r"\s*\[(?P<extras>[^\]]*)\]\s*$")
_log = logging.getLogger(__name__)


def discover(installed: Iterable[Distribution] | None = None) -> tuple[Declaration, ...]:
    """Declarations of every plugin of the installed distributions.

    A distribution declares the plugin API it was written for with one line, and may say otherwise for one
    plugin::

        [project.entry-points."dq_plugins.api"]
        version = "v1"
        "pass.my-new-pass" = "v2"

    Without that line it is taken to be of the first version, ``v1``.

    Args:
        installed: the distributions to read; every one on ``sys.path`` by default.

    Returns:
        The declarations, by kind, name and distribution.
    """
    found: dict[str, list[Declaration]] = {}
    for candidate in distributions() if installed is None else installed:
        try:
            # Most distributions have nothing for us, and parsing metadata costs: look at the text first.
            if "dq_plugins." not in (candidate.read_text("entry_points.txt") or ""):
                continue
            name = canonicalize_name(candidate.metadata["Name"])
            if name not in found:  # the first one on sys.path is the one that Python imports
                found[name] = list(_declarations(candidate, name))
        except Exception as error:  # one unreadable distribution must not hide the others
            where = getattr(candidate, "_path", candidate)
            _log.warning("the plugins of %s are left out, its metadata cannot be read: %s", where, error)
    return tuple(sorted((d for each in found.values() for d in each), key=_order))


def _order(declaration: Declaration) -> tuple[int, str, str]:
    return list(GROUPS).index(declaration.kind), declaration.name, declaration.distribution or ""


def _declarations(installed: Distribution, name: str) -> Iterator[Declaration]:
    entries = list(installed.entry_points)
    api = {entry.name: entry.value for entry in entries if entry.group == API_GROUP}
    for entry in entries:
        kind = _KIND_OF_GROUP.get(entry.group)
        if kind is not None:
            version = api.get(f"{kind}.{entry.name}", api.get("version", "v1"))
            yield _declaration(kind, entry, name, installed.version, version)


def _declaration(kind: str, entry: EntryPoint, distribution: str, version: str, api: str) -> Declaration:
    brackets = _EXTRAS.search(entry.value)
    extras = brackets["extras"].split(",") if brackets else []
    api_match = _API.fullmatch(api)
    return Declaration(
        kind=kind,
        name=entry.name,
        target=entry.value[: brackets.start()] if brackets else entry.value,
        distribution=distribution,
        version=version,
        api_version=int(api_match[1]) if api_match else None,
        extras=tuple(extra.strip() for extra in extras if extra.strip()),
    )
