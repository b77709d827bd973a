"""Run a measurement: units of work, in this process or in several, each finished unit kept."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Protocol

from dq_plugins.progress import Progress, finish
from dq_plugins.sensitivity.measurement_store import Store, Sums

__all__ = ["Measurement", "finish", "measure"]


class Measurement(Protocol):
    """Something to measure, in units that do not depend on each other. Picklable, when workers are to be used."""

    def units(self) -> list[str]:
        """Keys of the units."""
        ...

    def __call__(self, unit: str) -> Sums:
        """Measure one unit."""
        ...


def measure(
    measurement: Measurement,
    *,
    store: Store | None = None,
    workers: int = 1,
    what: str = "",
) -> Generator[Progress, None, dict[str, Sums]]:
    """Measure every unit that is not in the store yet. Iterate to run; the generator returns the results.

    With several workers, joblib runs them: local processes by default, or Dask or Ray inside
    ``with joblib.parallel_config("dask")`` and the like; they share the store's folder.

    Args:
        measurement: what to measure.
        store: where finished units are kept; a temporary one by default.
        workers: processes.
        what: shown with the progress.

    Yields:
        Progress.

    Returns:
        Sums by unit, in the order of the units.
    """
    from tempfile import TemporaryDirectory

    if store is None:
        with TemporaryDirectory(prefix="dq-sensitivity-") as folder:
            return (yield from measure(measurement, store=Store(Path(folder), {}), workers=workers, what=what))
    units = measurement.units()
    store.drop_claims()
    done = store.read()
    todo = [unit for unit in units if unit not in done]
    if workers > 1 and len(todo) > 1:
        yield Progress(len(units) - len(todo), len(units), f"{what}, {workers} workers")
        _spread(measurement, todo, store, min(workers, len(todo)))
    else:
        for position, unit in enumerate(todo, len(units) - len(todo)):
            yield Progress(position, len(units), what)
            store.add(unit, measurement(unit))
    found = store.read()
    yield Progress(len(units), len(units), what)
    return {unit: found[unit] for unit in units}


def _spread(measurement: Measurement, todo: list[str], store: Store, workers: int) -> None:
    from joblib import Parallel, delayed

    # every worker walks the whole list from its own start and takes what is not claimed: no queue, many machines
    shifts = [len(todo) * w // workers for w in range(workers)]
    tasks = (delayed(_work)(measurement, todo[s:] + todo[:s], store) for s in shifts)
    Parallel(n_jobs=workers)(tasks)


def _work(measurement: Measurement, units: list[str], store: Store) -> None:
    import torch

    torch.set_num_threads(1)
    for unit in units:
        if store.claim(unit):
            store.add(unit, measurement(unit))
