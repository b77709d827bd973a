"""Measurements in units that do not depend on each other: in this process or in several, each finished unit kept."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from typing import Protocol

from dq_plugins.artifact import Format, UnitResults
from dq_plugins.progress import Progress
from dq_plugins.workers import pool, shares

Sums = dict[str, float]
"""Result of a unit: sums by entry key, ``signal`` (what they are relative to), ``calls`` (cost in denoiser calls)."""

FORWARD, BACKWARD = 1.0, 2.0
"""Cost of a forward and of a backward pass, in denoiser calls."""

MEASURED: Format[Sums] = Format("measurement", 1, Sums, what="a measurement")
NOTHING_KEPT = UnitResults(MEASURED, None, {})


class Measurement(Protocol):
    """Something to measure. Picklable, when workers are to be used."""

    def units(self) -> list[str]:
        """Keys of the units."""
        ...

    def __call__(self, unit: str) -> Sums:
        """Measure one unit."""
        ...


def measure(
    measurement: Measurement, kept: UnitResults[Sums] = NOTHING_KEPT, *, workers: int = 1, what: str = ""
) -> Generator[Progress, None, dict[str, Sums]]:
    """Measure every unit that was not kept yet. Iterate to run; the generator returns the results.

    Several workers share the folder of the results; see `dq_plugins.workers`.

    Args:
        measurement: what to measure.
        kept: results of finished units.
        workers: processes, where `dq_plugins.workers` does not say more.
        what: shown with the progress.

    Returns:
        Sums by unit, in the order of the units.
    """
    units = measurement.units()
    found = {unit: sums for unit in units if (sums := kept.find(unit)) is not None}
    todo = [unit for unit in units if unit not in found]
    sharing = pool(workers)
    if sharing.count > 1 and len(todo) > 1:
        yield Progress(len(found), len(units), f"{what}, {sharing.count} workers")
        # one share for each worker: a measurement holds a denoiser, which is sent once
        tasks = [partial(_share, measurement, share, kept) for share in shares(todo, sharing.count)]
        for part in sharing.run(tasks):
            found |= part
    else:
        for unit in todo:
            yield Progress(len(found), len(units), what)
            found[unit] = _measured(measurement, unit, kept)
    yield Progress(len(units), len(units), what)
    return {unit: found[unit] for unit in units}


def _measured(measurement: Measurement, unit: str, kept: UnitResults[Sums]) -> Sums:
    sums = measurement(unit)
    kept.keep(unit, sums)
    return sums


def _share(measurement: Measurement, units: Sequence[str], kept: UnitResults[Sums]) -> dict[str, Sums]:
    return {unit: _measured(measurement, unit, kept) for unit in units}
