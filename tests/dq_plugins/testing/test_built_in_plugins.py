"""Every built-in plugin passes the suite that third parties' plugins must pass."""

from __future__ import annotations

import pytest

from dq_plugins import registry
from dq_plugins.testing import SUITES, run_suite, suite_for

BUILT_IN = [(plugin.kind, plugin.name) for plugin in registry.plugins() if plugin.declaration.built_in]


def test_there_are_built_in_plugins_and_a_suite_for_every_kind():
    assert ("adapter", "simulate") in BUILT_IN
    assert set(SUITES) == set(registry.KINDS)


@pytest.mark.parametrize(("kind", "name"), BUILT_IN)
def test_it_conforms(kind, name):
    results = list(run_suite(suite_for(kind, name)))
    assert len(results) > 5
    assert [(result.test, result.message) for result in results if result.outcome != "passed"] == []
