"""The environment variable ``DQ_PLUGINS``: which plugins may be used.

::

    DQ_PLUGINS = term ("," term)*
    term       = ["-"] [kind ":"] name ["@" distribution]

``name`` and ``distribution`` may hold the wildcards of `fnmatch`. A term that starts with ``-`` denies. Any other term
allows, and as soon as there is one, plugins of other distributions that no term allows are denied. Built-in plugins,
and those of code of this process, can only be denied. A denial wins. To tell two distributions in conflict apart::

    DQ_PLUGINS="-pass:bos-tokens@dq-plugins"
"""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from typing import NamedTuple

from dq_plugins.errors import RegistryError
from dq_plugins.registry.plugin import KINDS, Plugin

_TERM = re.compile(rf"(?P<deny>-)?((?P<kind>{'|'.join(KINDS)}):)?(?P<name>(?!-)[^:@]+)(@(?P<distribution>[^:@]+))?")


class Term(NamedTuple):
    """One term: as it was written, whether it denies, and a pattern of `Plugin.key`."""

    text: str
    denies: bool
    pattern: str

    def matches(self, plugin: Plugin) -> bool:
        """Whether this term is about ``plugin``."""
        return fnmatchcase(plugin.key, self.pattern)


def terms() -> list[Term]:
    """The terms of ``DQ_PLUGINS`` as it is now; `RegistryError` if one does not follow the grammar."""
    found = []
    for term in filter(None, map(str.strip, os.environ.get("DQ_PLUGINS", "").split(","))):
        match = _TERM.fullmatch(term)
        if match is None:
            raise RegistryError(
                f"the environment variable DQ_PLUGINS holds the term {term!r}, which is not of the form "
                f"[-][kind:]name[@distribution] with a kind among {', '.join(KINDS)}. "
                "Examples: 'my-observer', '-my-pass', 'pass:*@acme-dq'. Correct the term or unset DQ_PLUGINS."
            )
        pattern = f"{match['kind'] or '*'}:{match['name']}@{match['distribution'] or '*'}"
        found.append(Term(term, bool(match["deny"]), pattern))
    return found


def denial(plugin: Plugin) -> str:
    """Why ``plugin`` may not be used; empty when it may."""
    every = terms()
    matching = [term for term in every if term.matches(plugin)]
    for term in matching:
        if term.denies:
            return f"the term {term.text!r} of the environment variable DQ_PLUGINS denies it"
    allowing = ",".join(term.text for term in every if not term.denies)
    if matching or not allowing or plugin.built_in or plugin.distribution is None:
        return ""
    return f"the environment variable DQ_PLUGINS allows {allowing!r} and not this one; add its name"
