"""Compare the latency of several callables in one run.

The rounds are interleaved, so that a machine that slows down slows all of them, and each round has an order of its own,
because what ran just before leaves its data in the cache; nothing runs twice in a row, because it would find its own
data there. What counts is the ratio, not the milliseconds.

A wall clock measures what else the machine does, too. Where a choice hangs on the result, `thread_clock` counts the
time that the calling thread had a core, whoever else wants one; with several threads it includes its waiting for the
others, which spin.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

Clock = Callable[[], float]
"""Seconds since some moment."""

STABLE = 0.05
"""Largest relative difference of a quartile between the odd and the even rounds that counts as stable."""
MOST_ROUNDS = 8
"""How many times the given rounds are run, at most, until times are stable."""


@dataclass(frozen=True)
class Latency:
    """Time of one call, in milliseconds.

    Attributes:
        median: over the rounds.
        low: first quartile.
        high: third quartile.
        first: the first call, compilation included.
    """

    median: float
    low: float
    high: float
    first: float

    def __str__(self) -> str:
        return f"{self.median:.1f} ms ({self.low:.1f}-{self.high:.1f})"


def wall_clock() -> float:
    """Seconds that pass, of the device's work too."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def thread_clock(device: torch.device) -> Clock:
    """What times work on ``device`` in spite of others: this thread's CPU time, where its resolution allows that."""
    coarse = time.get_clock_info("thread_time").resolution > 1e-5
    return wall_clock if device.type != "cpu" or coarse else time.thread_time


def _timed(function: Callable[[], object], clock: Clock) -> float:
    start = clock()
    function()
    return (clock() - start) * 1e3


def stable(times: Mapping[str, list[float]]) -> bool:
    """Whether the odd and the even rounds, two of each at least, agree about the first quartile of every callable."""
    if any(len(each) < 4 for each in times.values()):
        return False
    quartiles = [
        tuple(statistics.quantiles(half, n=4)[0] for half in (each[::2], each[1::2])) for each in times.values()
    ]
    return all(abs(odd - even) <= STABLE * max(odd, even) for odd, even in quartiles)


def _shuffled(names: Iterable[str], seed: int, *, after: list[str]) -> list[str]:
    """The names in some order that does not begin with the one in ``after``."""
    order = sorted(names)
    random.Random(seed).shuffle(order)
    return order[1:] + order[:1] if order[:1] == after else order


@torch.no_grad()
def compare_latency(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    clock: Clock = wall_clock,
    until_stable: bool = False,
) -> dict[str, Latency]:
    """Time callables side by side.

    Args:
        functions: what to time, by name.
        rounds: timed calls of each.
        warmup: untimed calls of each after the first.
        clock: what measures: `wall_clock`, or a `thread_clock`.
        until_stable: repeat the rounds until times are `stable`, `MOST_ROUNDS` times at most.
    """
    first = {name: _timed(function, clock) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    order: list[str] = []
    turn, last = 0, warmup + rounds
    while turn < last:
        order = _shuffled(functions, turn, after=order[-1:])
        for name in order:
            elapsed = _timed(functions[name], clock)
            if turn >= warmup:
                times[name].append(elapsed)
        turn += 1
        if turn == last and until_stable and turn < warmup + MOST_ROUNDS * rounds and not stable(times):
            last += rounds
    result = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        result[name] = Latency(median, low, high, first[name])
    return result
