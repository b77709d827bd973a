from itertools import count, pairwise

import pytest

from dq_plugins.metrics import latency
from dq_plugins.metrics.latency import Latency, compare_latency


class Clock:
    """Time that passes only when a timed call says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_quartiles_are_of_the_timed_rounds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    seconds = {"a": iter([90.0, 70.0, 80.0, 3.0, 1.0, 7.0, 5.0, 2.0, 6.0, 4.0]), "b": count(1.0, 0.0)}

    def call(name: str):
        def run() -> None:
            clock.now += next(seconds[name])

        return run

    found = compare_latency({name: call(name) for name in seconds}, rounds=7, warmup=2)
    assert found["a"] == Latency(median=4000, low=2000, high=6000, first=90_000)
    assert found["b"] == Latency(median=1000, low=1000, high=1000, first=1000)


def test_rounds_are_interleaved_in_orders_of_their_own() -> None:
    order: list[str] = []
    names = ("one", "two", "three")
    compare_latency({name: lambda name=name: order.append(name) for name in names}, rounds=6, warmup=1)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == 8
    assert all(set(each) == set(names) for each in rounds)
    assert all(one != other for one, other in pairwise(order[3:]))  # nothing finds its own data in the cache
    assert len({tuple(each) for each in rounds}) > 2  # nothing always runs after the same other one
