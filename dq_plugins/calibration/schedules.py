"""Which schedules a sequence of denoiser calls went through."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def visited_schedules(calls: Iterable[Sequence[float]]) -> list[list[float]]:
    """Distinct schedules, in order of first appearance, from the timesteps of calls in order.

    Neighbouring calls with the same timesteps are one visit (guidance run as two calls, two-stage solvers). A new
    sampling run starts where a timestep comes back that this run had left: batches of images, one after the other.
    A call whose samples have different timesteps visits them in the order of the samples.

    Args:
        calls: timesteps of each call: one value, or one per sample.

    Example:
        >>> visited_schedules([[9], [9], [5], [1], [9], [5], [1], [9], [1]])
        [[9, 5, 1], [9, 1]]
    """
    runs: list[list[float]] = []
    current: list[float] = []
    last: set[float] = set()
    for timesteps in calls:
        values = list(dict.fromkeys(timesteps))
        if set(values) <= last:
            continue
        if any(value in current and value not in last for value in values):
            runs.append(current)
            current = []
        current = current + [value for value in values if value not in current]
        last = set(values)
    runs.append(current)
    distinct = {tuple(run): run for run in runs if run}
    return list(distinct.values())
