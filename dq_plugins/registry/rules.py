"""The environment variable ``DQ_PLUGINS``: which plugins may be used.

Grammar::

    DQ_PLUGINS = term ("," term)*
    term       = ["-"] [kind ":"] name ["@" distribution]

``name`` and ``distribution`` may hold the wildcards of `fnmatch`. A term that starts with ``-`` denies. Any
other term allows, and as soon as there is one, plugins of other distributions that no term allows are denied.
Built-in plugins, and those registered by code of this process, need no allowing and can only be denied. A
denial wins over every allowance. Two distributions in conflict are told apart by denying one of them::

    DQ_PLUGINS="my-observer,pass:*@acme-dq"       # of third parties, only these
    DQ_PLUGINS="-pass:bos-tokens@dq-plugins"      # use the bos-tokens pass of another distribution
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from dq_plugins.errors import RegistryError
from dq_plugins.registry.record import KINDS, Declaration

VARIABLE = "DQ_PLUGINS"
"""Name of the environment variable."""

_TERM = re.compile(r"(?P<deny>-)?(?:(?P<kind>[^:@]+):)?(?P<name>(?!-)[^:@]+)(?:@(?P<distribution>[^:@]+))?")


@dataclass(frozen=True)
class Term:
    """One term of ``DQ_PLUGINS``; see the grammar of this module.

    Attributes:
        text: the term as it was written.
        deny: whether it denies what it matches.
        kind: the kind it speaks of, None for every kind.
        name: pattern of the plugin's name.
        distribution: pattern of the distribution's name, None for any origin.
    """

    text: str
    deny: bool
    kind: str | None
    name: str
    distribution: str | None

    def matches(self, declaration: Declaration) -> bool:
        """Whether this term speaks of ``declaration``."""
        return (
            self.kind in (None, declaration.kind)
            and fnmatchcase(declaration.name, self.name)
            and (self.distribution is None or fnmatchcase(declaration.distribution or "", self.distribution))
        )


@dataclass(frozen=True)
class Rules:
    """Every term of ``DQ_PLUGINS``."""

    terms: tuple[Term, ...] = ()

    def denial(self, declaration: Declaration) -> str:
        """Why ``declaration`` may not be used; empty when it may."""
        for term in self.terms:
            if term.deny and term.matches(declaration):
                return f"the term {term.text!r} of the environment variable {VARIABLE} denies it"
        allowing = [term for term in self.terms if not term.deny]
        free = declaration.built_in or declaration.distribution is None
        if free or not allowing or any(term.matches(declaration) for term in allowing):
            return ""
        listed = ",".join(term.text for term in allowing)
        return f"the environment variable {VARIABLE} allows {listed!r} and not this one; add its name"


@lru_cache(maxsize=8)
def parse_rules(text: str) -> Rules:
    """Read the value of ``DQ_PLUGINS``.

    Args:
        text: the value; empty allows everything.

    Returns:
        The rules.

    Raises:
        RegistryError: a term does not follow the grammar or names an unknown kind.
    """
    return Rules(tuple(_parse_term(term.strip()) for term in text.split(",") if term.strip()))


def _parse_term(text: str) -> Term:
    match = _TERM.fullmatch(text)
    if match is None or match["kind"] not in (None, *KINDS):
        raise RegistryError(
            f"the environment variable {VARIABLE} holds the term {text!r}, which is not of the form "
            f"[-][kind:]name[@distribution] with a kind among {', '.join(KINDS)}. "
            f"Examples: 'my-observer', '-my-pass', 'pass:*@acme-dq'. Correct the term or unset {VARIABLE}."
        )
    return Term(text, match["deny"] is not None, match["kind"], match["name"], match["distribution"])
