from __future__ import annotations

import pytest

from dq_plugins.errors import RegistryError
from dq_plugins.registry import Plugin
from dq_plugins.registry.rules import denial, terms

THEIRS = Plugin("observer", "wide", "m:o", distribution="acme-dq", version="1")
OURS = Plugin("observer", "minmax", "m:o", distribution="dq-plugins", version="1")
HERE = Plugin("observer", "local", "m:o")


@pytest.mark.parametrize(
    ("text", "theirs", "ours", "here"),
    [
        ("", True, True, True),
        ("wide", True, True, True),
        ("something-else", False, True, True),
        ("observer:wide", True, True, True),
        ("pass:wide", False, True, True),
        ("*@acme-dq", True, True, True),
        ("*@acme", False, True, True),
        ("-wide", False, True, True),
        ("-*@acme-*", False, True, True),
        ("-minmax", True, False, True),
        ("-local", True, True, False),
        ("-*", False, False, False),
        ("wide, -observer:wide", False, True, True),
        (" wide , other ,", True, True, True),
    ],
)
def test_who_may_be_used(monkeypatch, text, theirs, ours, here):
    monkeypatch.setenv("DQ_PLUGINS", text)
    allowed = [not denial(plugin) for plugin in (THEIRS, OURS, HERE)]
    assert allowed == [theirs, ours, here]


@pytest.mark.parametrize("text", ["metrics:x", "a@", ":x", "a:b:c", "x@y@z", "-"])
def test_term_outside_the_grammar_is_an_error_that_shows_the_grammar(monkeypatch, text):
    monkeypatch.setenv("DQ_PLUGINS", text)
    with pytest.raises(RegistryError, match=r"\[-\]\[kind:\]name\[@distribution\]"):
        terms()
