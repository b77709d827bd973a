"""Every built-in plugin passes the suite that third parties' plugins must pass."""

from __future__ import annotations

import pytest

from dq_plugins import registry
from dq_plugins.testing import SUITES, run_suite, suite_for

BUILT_IN = [(plugin.kind, plugin.name) for plugin in registry.plugins() if plugin.declaration.built_in]
SHORT = {"temporal-reconstruction": {"iterations": 20}}
"""Options that make a pass quick; what it is checked for does not depend on them."""


def test_there_are_built_in_plugins_and_a_suite_for_every_kind():
    assert ("adapter", "simulate") in BUILT_IN
    assert set(SUITES) == set(registry.KINDS)


@pytest.mark.parametrize(("kind", "name"), BUILT_IN)
def test_it_conforms(kind, name):
    options = {}
    if kind == "pass":
        options = SHORT.get(name, {})
    elif kind == "recipe":
        options = {"options": {step: SHORT[step] for step in registry.get(kind, name).passes() if step in SHORT}}
    suite = type("Suite", (suite_for(kind, name),), {"options": options})
    results = list(run_suite(suite))
    assert [(result.test, result.message) for result in results if result.outcome in ("failed", "error")] == []
    assert sum(result.outcome == "passed" for result in results) > 4
