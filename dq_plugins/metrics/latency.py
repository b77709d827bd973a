"""Compare the latency of several callables in one run.

The rounds are interleaved, so that a machine that slows down slows all of them, and each round has an order of its own,
because what ran just before leaves its data in the cache; nothing runs twice in a row, because it would find its own
data there. What counts is the ratio, not the milliseconds.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one call, in milliseconds.

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


def _timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def _shuffled(names: Iterable[str], seed: int, *, after: list[str]) -> list[str]:
    """The names in some order that does not begin with the one in ``after``."""
    order = sorted(names)
    random.Random(seed).shuffle(order)
    return order[1:] + order[:1] if order[:1] == after else order


@torch.no_grad()
def compare_latency(
    functions: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 2
) -> dict[str, Latency]:
    """Time callables side by side.

    Args:
        functions: what to time, by name.
        rounds: timed calls of each.
        warmup: untimed calls of each after the first.
    """
    first = {name: _timed(function) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    order: list[str] = []
    for i in range(warmup + rounds):
        order = _shuffled(functions, i, after=order[-1:])
        for name in order:
            elapsed = _timed(functions[name])
            if i >= warmup:
                times[name].append(elapsed)
    result = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        result[name] = Latency(median, low, high, first[name])
    return result
