import time
from collections.abc import Callable, Iterator
from itertools import count, cycle, pairwise

import torch

from dq_plugins.metrics.latency import MOST_ROUNDS, Latency, compare_latency, thread_clock


class Clock:
    """Time that passes only when a timed call says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: Iterator[float]) -> Callable[[], None]:
        def run() -> None:
            self.now += next(seconds)

        return run


def test_quartiles_are_of_the_timed_rounds_only() -> None:
    clock = Clock()
    seconds = {"a": iter([90.0, 70.0, 80.0, 3.0, 1.0, 7.0, 5.0, 2.0, 6.0, 4.0]), "b": count(1.0, 0.0)}
    calls = {name: clock.passes(each) for name, each in seconds.items()}
    found = compare_latency(calls, rounds=7, warmup=2, clock=clock)
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


def test_times_that_differ_are_taken_again() -> None:
    def rounds_of(seconds: Iterator[float]) -> int:
        clock, calls = Clock(), []
        times = {"a": clock.passes(seconds), "b": lambda: calls.append(1)}
        compare_latency(times, rounds=4, warmup=0, clock=clock, until_stable=True)
        return len(calls) - 1  # less the first call

    assert rounds_of(count(1.0, 0.0)) == 4
    assert rounds_of(cycle([1.0, 2.0])) == 4 * MOST_ROUNDS  # odd and even rounds never agree
    settles = iter([1.0, 5.0, 1.0, 1.0, 4.0, *[1.0] * 100])
    assert 4 < rounds_of(settles) < 4 * MOST_ROUNDS


def test_the_clock_of_a_thread_stands_still_while_others_have_its_core() -> None:
    x = torch.ones(300, 300)
    calls = {"waits": lambda: time.sleep(0.03), "works": lambda: x @ x}
    found = compare_latency(calls, rounds=5, clock=thread_clock(x.device))
    assert found["waits"].median < found["works"].median
    assert compare_latency(calls, rounds=5)["waits"].median > 25
