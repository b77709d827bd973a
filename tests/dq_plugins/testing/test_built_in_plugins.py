"""Every built-in plugin passes the suite that third parties' plugins must pass."""

from __future__ import annotations

import pytest

from dq_plugins import registry
from dq_plugins.testing import SUITES, run_suite, suite_for

BUILT_IN = [(plugin.kind, plugin.name) for plugin in registry.plugins() if plugin.built_in]
SHORT = {
    "timestep-groups": {"rounds": 2},
    "temporal-reconstruction": {"iterations": 20},
    "block-reconstruction": {"iterations": 5, "calls": 5},
    "low-rank": {"ranks": [2], "most": 1.0, "most_bits": 8, "least_gain": 0.0},
    "weight-group-sizes": {"bytes": 64},
    "group-widths": {"seconds": 0.2, "probes": 2, "runs": 1},
    "step-exceptions": {"most": 1, "runs": 1},
    "sampler-correction": {"optional": True},
    "sensitivity": {"draws": 8, "check_entries": 2, "calls_per_timestep": 1},
    "timestep-reduction": {"generations": 2, "population": 6, "mutants": 3, "crossovers": 1, "seconds": 0.2},
}
"""Options that make a pass quick; what it is checked for does not depend on them."""


def test_there_are_built_in_plugins_and_a_suite_for_every_kind():
    assert ("adapter", "simulate") in BUILT_IN
    assert set(SUITES) == set(registry.KINDS)


@pytest.mark.parametrize(("kind", "name"), BUILT_IN)
def test_it_conforms(kind, name):
    state, reason = registry.status(next(each for each in registry.plugins(kind) if each.name == name))
    if state == "missing requirement":
        pytest.skip(reason)
    results = list(run_suite(type("Suite", (suite_for(kind, name),), quick(kind, name))))
    assert [(result.test, result.message) for result in results if result.outcome in ("failed", "error")] == []
    assert sum(result.outcome == "passed" for result in results) > 4


def quick(kind, name):
    """Attributes that make the suite of a pass or a recipe quick."""
    if kind == "pass":
        required = registry.get(kind, name).requires
        return {"options": SHORT.get(name, {}), "before": {each: SHORT[each] for each in required if each in SHORT}}
    if kind == "recipe":
        return {
            "options": {"options": {step: SHORT[step] for step in registry.get(kind, name).passes() if step in SHORT}}
        }
    return {}
