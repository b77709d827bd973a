import time
from itertools import pairwise

from dq_plugins.metrics.latency import compare_latency


def test_rounds_are_interleaved_and_ordered_by_cost() -> None:
    order = []

    def call(name: str, seconds: float):
        def run() -> None:
            order.append(name)
            time.sleep(seconds)

        return run

    calls = {"slow": call("slow", 0.02), "fast": call("fast", 0.0), "other": call("other", 0.0)}
    result = compare_latency(calls, rounds=6, warmup=1)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == 8
    assert all(set(each) == set(calls) for each in rounds)
    assert all(one != other for one, other in pairwise(order[3:]))  # nothing finds its own data in the cache
    assert result["fast"].median < result["slow"].median
    assert len({tuple(each) for each in rounds}) > 2  # nothing always runs after the same other one
    assert result["slow"].low <= result["slow"].median <= result["slow"].high
