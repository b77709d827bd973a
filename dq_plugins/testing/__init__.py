"""Conformance suites: what every plugin of a kind must do, as classes that anyone's tests inherit.

In the tests of a plugin package::

    from dq_plugins.testing import ObserverConformance

    class TestMyObserver(ObserverConformance):
        name = "my-observer"

``dq-plugins check my-observer`` runs the same suite without pytest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dq_plugins.testing.adapter_conformance import AdapterConformance
from dq_plugins.testing.conformance import Conformance, ConformanceError, expect, refused
from dq_plugins.testing.metric_conformance import MetricConformance
from dq_plugins.testing.observer_conformance import ObserverConformance
from dq_plugins.testing.pass_conformance import PassConformance
from dq_plugins.testing.recipe_conformance import RecipeConformance
from dq_plugins.testing.running import Result, run_suite
from dq_plugins.testing.solver_conformance import SolverConformance

if TYPE_CHECKING:
    from dq_plugins.registry import Kind

__all__ = [
    "SUITES",
    "AdapterConformance",
    "Conformance",
    "ConformanceError",
    "MetricConformance",
    "ObserverConformance",
    "PassConformance",
    "RecipeConformance",
    "Result",
    "SolverConformance",
    "expect",
    "refused",
    "run_suite",
    "suite_for",
]

SUITES: dict[str, type[Conformance]] = {
    suite.kind: suite
    for suite in (
        PassConformance,
        ObserverConformance,
        MetricConformance,
        SolverConformance,
        AdapterConformance,
        RecipeConformance,
    )
}
"""The suite of every kind."""


def suite_for(kind: Kind | str, name: str) -> type[Conformance]:
    """The suite of a kind, bound to one plugin of it."""
    return type(f"{SUITES[kind].__name__}Of{name}", (SUITES[kind],), {"name": name})
