"""Check that what a plugin requires is installed, before any of its code runs.

An entry point names extras of its own distribution in brackets (``name = "pkg.module:Object [torchao]"``, the
standard meaning): every ``Requires-Dist`` that the extra adds must be installed in a version that matches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from dq_plugins.registry.record import Declaration


def missing_requirements(declaration: Declaration) -> str:
    """Say what a plugin requires and does not find.

    Args:
        declaration: the plugin; its ``extras`` and ``requires`` are checked, nothing is imported.

    Returns:
        A sentence with the pip line that helps, or the empty string if nothing is missing.
    """
    problems = list(_unmet_texts(declaration.requires))
    wanted = [f"{text}" for text in declaration.requires]
    if declaration.distribution is not None and declaration.extras:
        problems += _unmet_extras(declaration.distribution, declaration.extras, set())
        wanted.append(f"{declaration.distribution}[{','.join(declaration.extras)}]")
    if not problems:
        return ""
    line = " ".join(f"'{text}'" for text in wanted)
    return f"it needs {'; '.join(dict.fromkeys(problems))}. Install with: pip install {line}"


def _unmet_texts(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            yield f"{text!r}, which is not a requirement pip understands ({error})"
            continue
        if requirement.marker is None or requirement.marker.evaluate():
            yield from _unmet(requirement, set())


def _unmet(requirement: Requirement, seen: set[tuple[str, str]]) -> Iterator[str]:
    """Say why ``requirement`` or an extra it asks for is not met."""
    wanted = f"{requirement.name}{requirement.specifier}"
    try:
        found = distribution(requirement.name)
    except PackageNotFoundError:
        yield f"{wanted} (not installed)"
        return
    # A pre-release that the user installed on purpose counts: torch nightlies are such.
    if not requirement.specifier.contains(found.version, prereleases=True):
        yield f"{wanted} (found {found.version})"
    yield from _unmet_extras(requirement.name, requirement.extras, seen)


def _unmet_extras(name: str, extras: Iterable[str], seen: set[tuple[str, str]]) -> Iterator[str]:
    """Say what extras of an installed distribution need and the environment lacks; ``seen`` ends cycles."""
    installed = distribution(name)
    for extra in extras:
        key = (canonicalize_name(name), canonicalize_name(extra))
        if key in seen:
            continue
        seen.add(key)
        if key[1] not in _provided_extras(installed):
            yield f"the extra {extra!r}, which distribution {name!r} does not define"
        for requirement in _added_by(installed, key[1]):
            yield from _unmet(requirement, seen)


def _provided_extras(installed: Distribution) -> set[str]:
    return {canonicalize_name(extra) for extra in installed.metadata.get_all("Provides-Extra") or ()}


def _added_by(installed: Distribution, extra: str) -> Iterator[Requirement]:
    """Requirements that hold with ``extra`` and not without it."""
    for text in installed.requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            yield requirement
