"""What package metadata says: the plugins that are installed, and whether what they require is; no plugin code runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from dq_plugins.registry.plugin import GROUPS, Plugin

API_GROUP = "dq_plugins.api"
_EXTRAS = re.compile(r"\s*\[(.*)\]\s*$")


def discover(installed: Iterable[Distribution] | None = None) -> list[Plugin]:
    """The plugins of some distributions, by default of every one on ``sys.path``."""
    found: dict[str, list[Plugin]] = {}
    for each in distributions() if installed is None else installed:
        try:
            # Most distributions have nothing for us, and parsing metadata costs: look at the text first.
            if "dq_plugins." not in (each.read_text("entry_points.txt") or ""):
                continue
            name = canonicalize_name(each.metadata["Name"])
            if name not in found:  # the first one on sys.path is the one that Python imports
                found[name] = list(_plugins(each, name))
        except Exception as error:  # one unreadable distribution must not hide the others
            where = getattr(each, "_path", each)
            logging.getLogger(__name__).warning("plugins of %s left out, its metadata is unreadable: %s", where, error)
    return [plugin for name in sorted(found) for plugin in found[name]]


def _plugins(installed: Distribution, name: str) -> Iterator[Plugin]:
    entries = installed.entry_points
    api = {entry.name: entry.value for entry in entries.select(group=API_GROUP)}
    for kind, group in GROUPS.items():
        for entry in entries.select(group=group):
            extras = _EXTRAS.search(entry.value)
            yield Plugin(
                kind, entry.name, _EXTRAS.sub("", entry.value), name, installed.version,
                api.get(f"{kind}.{entry.name}", api.get("version", "v1")),
                (f"{name}[{extras[1]}]",) if extras else (),
            )  # fmt: skip


def missing_requirements(requires: Iterable[str]) -> str:
    """What of some requirements (PEP 508) is not installed, with the pip line that helps; empty if nothing."""
    seen: set[str] = set()
    problems = dict.fromkeys(problem for text in requires for problem in _unmet(text, "", seen))
    line = " ".join(f"'{text}'" for text in requires)
    return f"it needs {'; '.join(problems)}. Install with: pip install {line}" if problems else ""


def _unmet(text: str, extra: str, seen: set[str]) -> Iterator[str]:
    """Say what a requirement lacks, if it is among those that ``extra`` adds; ``seen`` ends cycles of extras."""
    try:
        wanted = Requirement(text)
    except InvalidRequirement as error:
        yield f"{text!r}, which is not a requirement pip understands ({error})"
        return
    holds = {each: wanted.marker is None or wanted.marker.evaluate({"extra": each}) for each in ("", extra)}
    if text in seen or not holds[extra] or (extra and holds[""]):
        return
    seen.add(text)
    try:
        found = distribution(wanted.name)
    except PackageNotFoundError:
        yield f"{wanted.name}{wanted.specifier} (not installed)"
        return
    # A pre-release that the user installed on purpose counts: torch nightlies are such.
    if not wanted.specifier.contains(found.version, prereleases=True):
        yield f"{wanted.name}{wanted.specifier} (found {found.version})"
    provided = {canonicalize_name(each) for each in found.metadata.get_all("Provides-Extra") or ()}
    for asked in sorted(wanted.extras):
        if canonicalize_name(asked) not in provided:
            yield f"the extra {asked!r}, which distribution {wanted.name!r} does not define"
        for each in found.requires or ():
            yield from _unmet(each, canonicalize_name(asked), seen)
