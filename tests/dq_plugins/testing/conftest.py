"""Run a suite on an object that is registered for one test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dq_plugins import graph, registry
from dq_plugins.graph import Partition
from dq_plugins.recipe import pass_context
from dq_plugins.testing.conformance import Conformance
from dq_plugins.testing.running import run_suite

_partitions: list[Partition] = []


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every suite here runs on the same tiny denoiser: trace it once, which is most of the time of a plan."""

    def partition(*args: Any, **kwargs: Any) -> Partition:
        if not _partitions:
            _partitions.append(graph.partition(*args, **kwargs))
        return _partitions[0]

    monkeypatch.setattr(pass_context, "partition", partition)


@pytest.fixture
def failures() -> Callable[..., set[str]]:
    """Names of the tests of a suite that an object does not pass, by ``failures(suite, object)``."""

    def run(suite: type[Conformance], plugin: Any, **attributes: Any) -> set[str]:
        named = type("Suite", (suite,), {"name": "under-test", **attributes})
        with registry.temporary(suite.kind, "under-test", plugin):
            return {result.test for result in run_suite(named) if result.outcome in ("failed", "error")}

    return run
