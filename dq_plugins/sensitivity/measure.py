"""Measurements in units that do not depend on each other: in this process or in several, each finished unit kept."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

import torch

from dq_plugins.artifact import Format, UnitResults
from dq_plugins.progress import Progress

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

    With several workers, joblib runs them: local processes by default, or Dask or Ray inside
    ``with joblib.parallel_config("dask")`` and the like; they share the folder of the results.

    Args:
        measurement: what to measure.
        kept: results of finished units.
        workers: processes.
        what: shown with the progress.

    Returns:
        Sums by unit, in the order of the units.
    """
    units = measurement.units()
    found = {unit: sums for unit in units if (sums := kept.find(unit)) is not None}
    todo = [unit for unit in units if unit not in found]
    if workers > 1 and len(todo) > 1:
        from joblib import Parallel, delayed

        yield Progress(len(found), len(units), f"{what}, {workers} workers")
        # one share for each worker: a measurement holds a denoiser, which is sent once
        shares = [todo[start::workers] for start in range(min(workers, len(todo)))]
        parts = Parallel(n_jobs=len(shares))(delayed(_share)(measurement, share, kept) for share in shares)
        for part in parts:
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
    torch.set_num_threads(1)
    return {unit: _measured(measurement, unit, kept) for unit in units}
