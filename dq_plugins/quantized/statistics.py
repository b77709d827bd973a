"""What is known about the inputs of every layer at every timestep, whatever runs the denoiser.

For each (layer, timestep) the exact count, minimum, maximum and mean square are kept, and a histogram of at most a few
thousand bins, from which the error of any candidate range at any width follows with the quantizer that executes.
Histograms exist in memory for the timesteps of the running call only; all others lie on disk, one file a timestep, and
are read back when their timestep is visited again, as every further prompt of a sampling run does. Memory does not
grow with steps or prompts.

Shapes: ``T`` timesteps, ``C`` candidate ranges.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.artifact import STRICT, Format, StoredTensor, UnitResults
from dq_plugins.calibration import CalibrationSet
from dq_plugins.errors import CalibrationError
from dq_plugins.hashing import hash_json
from dq_plugins.observers.candidate_ranges import candidate_ranges
from dq_plugins.observers.distribution import BINS
from dq_plugins.observers.error import ErrorTable, range_errors
from dq_plugins.observers.histogram import INDEX_BITS, MIN_EXPONENT, Histogram
from dq_plugins.observers.observer import Observer
from dq_plugins.observers.streaming import Receive, located, require_reached, stream_inputs
from dq_plugins.quantized.layer_transform import LayerTransform
from dq_plugins.scratch import Scratch
from dq_plugins.timesteps import RowOrder, by_sample_or_token, fit_to_input
from dq_plugins.workers import pool, shares


@dataclass(frozen=True)
class LayerRecord:
    """What a file holds of the inputs of one layer at one timestep.

    Attributes:
        count: of values.
        low: the smallest.
        high: the largest.
        squares: sum of their squares.
        exponent: of the histogram's bins, see `Histogram`, as the rest.
        first: index of the first bin.
        counts: int64 ``[n]``.
        sums: float64 ``[n]``.
    """

    __pydantic_config__ = STRICT

    count: int
    low: float
    high: float
    squares: float
    exponent: int
    first: int
    counts: StoredTensor
    sums: StoredTensor

    def __post_init__(self) -> None:
        fits = self.counts.dim() == 1 and self.counts.shape == self.sums.shape and self.count >= 1
        if not fits or (self.counts.dtype, self.sums.dtype) != (torch.int64, torch.float64):
            raise ValueError("a histogram has a count (int64) and a sum (float64) for each of its bins")
        lattice = MIN_EXPONENT <= self.exponent <= 128 and abs(self.first) <= 2 << INDEX_BITS
        if not lattice or int(self.counts.min()) < 0 or not bool(torch.isfinite(self.sums).all()):
            raise ValueError("a histogram has counts from 0 and finite sums, in bins that float32 can number")


SAMPLE = 1 << 17
"""Values of a layer's input that enter the histogram, at least, for each call; its ends are those of all values."""

PIECE = 1 << 14
"""Values that one thread squares and adds up in float32, whatever the number of threads."""

TIMESTEP: Format[dict[str, LayerRecord]] = Format(
    "statistics", 2, dict[str, LayerRecord], CalibrationError, "statistics of a timestep"
)


def _squares(values: Tensor) -> float:
    """Sum of squares of float32 values ``[n]``: float32 in pieces, whose sums are added in float64."""
    pieces = sum(float(piece.dot(piece)) for piece in values.split(PIECE))
    # too large, or so small that their squares are not normal numbers: several times as slow
    return pieces if 1e-30 < pieces < 1e38 else float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


class InputStatistics(Observer):
    """Everything that is kept about one layer's inputs at one timestep."""

    name = "statistics"

    def __init__(self, bins: int = BINS) -> None:
        super().__init__(symmetric=False)
        self.histogram = Histogram(bins)
        self.squares = 0.0

    def observe(self, values: Tensor) -> None:
        """Add the values to the histogram and to the sum of squares."""
        self.squares += _squares(values)
        # an odd step meets all channels and positions, whose numbers are mostly even
        some = values[:: 2 * (len(values) // (2 * SAMPLE)) + 1]
        self.histogram.update(some, *(float(v) for v in some.aminmax()))

    def absorb(self, other: InputStatistics) -> None:
        """Add the other's histogram and sum of squares."""
        self.histogram.merge(other.histogram)
        self.squares += other.squares

    def choose_range(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return self.low, self.high

    @property
    def record(self) -> LayerRecord:
        """Everything, to be written."""
        h = self.histogram
        return LayerRecord(self.count, self.low, self.high, self.squares, h.exponent, h.first, h.counts, h.sums)

    @classmethod
    def of(cls, record: LayerRecord, bins: int = BINS) -> InputStatistics:
        """What `record` gave; the record's tensors may lie in a file."""
        found = cls(bins)
        found.count, found.low, found.high, found.squares = record.count, record.low, record.high, record.squares
        h = found.histogram
        h.exponent, h.first = record.exponent, record.first
        h.counts, h.sums = record.counts.clone(), record.sums.clone()
        return found


class Collector:
    """Statistics that are being collected.

    Args:
        folder: where finished timesteps are kept; a temporary folder by default, deleted with the last of the
            collector and its `Statistics`.
        source: what the values come from; a file of another source counts as absent.
        bins: resolution of the histograms, see `Histogram`.

    Attributes:
        rows: where the samples of a call are in the inputs of layers, for calls of several timesteps.
    """

    def __init__(
        self, folder: str | Path | None = None, *, source: Mapping[str, Any] | None = None, bins: int = BINS
    ) -> None:
        self._owner = Scratch("statistics") if folder is None else None
        self._kept = UnitResults(
            TIMESTEP, self._owner.path if self._owner is not None else folder, {**(source or {}), "bins": bins}
        )
        self.bins = bins
        self.rows: Mapping[str, RowOrder | None] = {}
        self._open: dict[float, dict[str, InputStatistics]] = {}
        self._seen: set[float] = set()
        self._lock = threading.Lock()  # threads may share a denoiser

    @property
    def folder(self) -> str:
        """Where finished timesteps are kept."""
        return str(self._kept.folder)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Timesteps at which anything was seen, ascending."""
        return tuple(sorted(self._seen))

    def see(self, layer: str, x: Tensor, timestep: Tensor | float, spatial: int = 0) -> None:
        """See an input of a layer.

        Args:
            layer: its name.
            x: ``[N, ...]``.
            timestep: of the call: a number, ``[]``, ``[1]``, one for each sample or one for each token, see
                `dq_plugins.timesteps.fit_to_input`.
            spatial: dimensions that the layer's kernel slides over.

        Raises:
            CalibrationError: a value is NaN or infinite.
            TimestepError: the rows of ``x`` are not the samples or tokens that have timesteps.
        """
        t = by_sample_or_token(torch.as_tensor(timestep, dtype=torch.float64).cpu())
        values = sorted(set(t.reshape(-1).tolist()))
        owner = fit_to_input(t, x, spatial, self.rows.get(layer)) if len(values) > 1 else t
        with self._lock:
            self.visit(values)
            for value in values:
                part = x if len(values) == 1 else x[(owner == value).to(x.device)]
                if not part.numel():
                    continue
                if layer not in self._open[value]:
                    self._open[value][layer] = InputStatistics(self.bins)
                with located(layer, value):
                    self._open[value][layer].update(part)
                self._seen.add(value)

    def visit(self, timesteps: Iterable[float]) -> None:
        """Have these timesteps in memory, and no others."""
        wanted = set(timesteps)
        for timestep in set(self._open) - wanted:
            layers = self._open.pop(timestep)
            if layers:
                self._kept.keep(_unit(timestep), {name: each.record for name, each in layers.items()})
        for timestep in wanted - set(self._open):
            found = self._kept.find(_unit(timestep), mapped=True) or {}
            self._open[timestep] = {name: InputStatistics.of(record, self.bins) for name, record in found.items()}

    def at(self, timestep: float) -> dict[str, InputStatistics]:
        """What was seen so far at a timestep, by layer."""
        self.visit([timestep])
        return self._open[timestep]

    def holds(self, timestep: float) -> bool:
        """Whether the folder has this timestep, of this source."""
        return self._kept.find(_unit(timestep), mapped=True) is not None

    def statistics(self, layers: Sequence[str], timesteps: Sequence[float] | None = None) -> Statistics:
        """What was seen of some layers; nothing more is collected.

        Args:
            layers: names.
            timesteps: which of them; all that were seen by default.
        """
        self.visit(())
        chosen = self.timesteps if timesteps is None else tuple(timesteps)
        records = [self._kept.find(_unit(t), mapped=True) or {} for t in chosen]
        return Statistics(records, layers, chosen, owner=self._owner)


def _unit(timestep: float) -> str:
    return f"timestep {timestep!r}"


class Statistics:
    """Statistics of layers' inputs by timestep; made by `collect` or by a `Collector`.

    A layer that did not run at some timestep has count 0 there, and no error.

    Attributes:
        layers: fully qualified names.
        timesteps: ascending.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, LayerRecord]],
        layers: Sequence[str],
        timesteps: Sequence[float],
        owner: object = None,
    ) -> None:
        """``records``: of each timestep, tensors on disk; ``owner`` is kept alive: the temporary folder, if any."""
        self.layers = tuple(layers)
        self.timesteps = tuple(timesteps)
        self._owner = owner
        self._records = records

    def count(self, layer: str) -> Tensor:
        """Number of values at each timestep, ``[T]``."""
        return self._summary(layer)[:, 0].long()

    def low(self, layer: str) -> Tensor:
        """Smallest value at each timestep, exactly: float64 ``[T]``."""
        return self._summary(layer)[:, 1]

    def high(self, layer: str) -> Tensor:
        """Largest value at each timestep, exactly: float64 ``[T]``."""
        return self._summary(layer)[:, 2]

    def mean_square(self, layer: str) -> Tensor:
        """Mean square at each timestep: float64 ``[T]``."""
        return self._summary(layer)[:, 3]

    def _summary(self, layer: str) -> Tensor:
        if layer not in self.layers:
            raise CalibrationError(f"no statistics were collected for layer {layer!r}")
        return self._summaries[layer]

    @cached_property
    def hash(self) -> str:
        """sha256 of everything that the statistics hold."""
        parts = [TIMESTEP.seal({n: r[n] for n in self.layers if n in r})[0]["hash"] for r in self._records]
        return hash_json([list(self.layers), list(self.timesteps), parts])

    @cached_property
    def _summaries(self) -> dict[str, Tensor]:
        """By layer ``[T, 4]``: count, smallest value, largest value, mean square."""
        rows = {n: [_summary_of(record.get(n)) for record in self._records] for n in self.layers}
        return {n: torch.tensor(each, dtype=torch.float64).reshape(-1, 4) for n, each in rows.items()}

    def at(self, layer: str, index: int) -> InputStatistics:
        """Everything about a layer at the timestep with this index."""
        self._summary(layer)
        found = self._records[index].get(layer)
        return InputStatistics.of(found) if found else InputStatistics()

    def points(self, layer: str, index: int) -> tuple[Tensor, Tensor]:
        """Weighted values at the timestep with this index: float32 ``[N]`` ascending, and float64 ``[N]``."""
        return self.at(layer, index).histogram.points()

    def errors(
        self, layer: str, low: Tensor, high: Tensor, bits: int, *, symmetric: bool = True, power: float = 2.0
    ) -> Tensor:
        """Mean ``|x - x^|^power`` at each timestep for given ranges ``[C]``: float64 ``[T, C]``."""
        found = torch.zeros(len(self.timesteps), len(low), dtype=torch.float64)
        for index in self.count(layer).nonzero().flatten().tolist():
            points = self.points(layer, index)
            found[index] = range_errors(*points, low, high, bits, symmetric=symmetric, power=power)
        return found

    def error_table(self, layer: str, bits: int, *, symmetric: bool = True, power: float = 2.0) -> ErrorTable:
        """Errors of ranges worth trying; see `dq_plugins.observers.candidate_ranges`.

        Args:
            layer: fully qualified name.
            bits: width of the quantizer.
            symmetric: whether its zero point is fixed at 0.
            power: p of the error norm.
        """
        low, high = candidate_ranges(self.low(layer), self.high(layer), symmetric=symmetric)
        error = self.errors(layer, low, high, bits, symmetric=symmetric, power=power)
        seen = self.count(layer) > 0
        return ErrorTable(low, high, error, float(self.mean_square(layer)[seen].mean()))

    def error_tables(
        self, bits: int | Mapping[str, int], *, symmetric: bool = True, power: float = 2.0
    ) -> dict[str, ErrorTable]:
        """`error_table` of every layer; ``bits`` may differ by layer."""
        width = bits if isinstance(bits, Mapping) else dict.fromkeys(self.layers, bits)
        return {layer: self.error_table(layer, width[layer], symmetric=symmetric, power=power) for layer in self.layers}


def _summary_of(record: LayerRecord | None) -> tuple[float, float, float, float]:
    return (0, 0, 0, 0) if record is None else (record.count, record.low, record.high, record.squares / record.count)


def collect(
    denoiser: nn.Module,
    calibration: CalibrationSet,
    layers: Sequence[str],
    *,
    folder: str | Path | None = None,
    bins: int = BINS,
    transforms: Mapping[str, LayerTransform] = MappingProxyType({}),
    rows: Mapping[str, RowOrder | None] = MappingProxyType({}),
    also: Receive | None = None,
    progress: bool = False,
) -> Statistics:
    """Run the recorded calls once and collect the statistics of the inputs of layers.

    Args:
        denoiser: the full-precision denoiser.
        calibration: calls recorded from it.
        layers: fully qualified names.
        folder: where to keep the histograms. The same call with the same folder goes on where it was interrupted.
            A temporary folder, deleted with the result, by default.
        bins: resolution of the histograms, see `Histogram`.
        transforms: of the inputs of some layers.
        rows: where the samples of a call are in them.
        also: told every input too, as `dq_plugins.observers.streaming.stream_inputs` would.
        progress: show a progress bar, where one process collects; see `dq_plugins.workers` for several.

    Raises:
        CalibrationError: a layer does not exist, never ran, or its input is not finite.
    """
    hashes = {layer: transforms[layer].hash for layer in layers if layer in transforms}
    source = {"calibration": calibration.hash, "layers": list(layers), "transforms": hashes}
    collector = Collector(folder, source=source, bins=bins)
    collector.rows = dict(rows)
    todo = [t for t in calibration.timesteps if not collector.holds(t)]
    sharing = pool()
    if sharing.count > 1 and len(todo) > 1 and also is None:
        # a timestep is one process's and one file: nothing is added up over processes, so the result is the same
        run = partial(
            _see_timesteps, denoiser, calibration, layers, collector.folder, source, bins, dict(transforms), dict(rows)
        )
        sharing.run([partial(run, share) for share in shares(todo, sharing.count)])
        if not any(collector.holds(t) for t in todo):
            raise CalibrationError(
                f"no statistics arrived in {collector.folder}: workers on several machines need a workdir on a file "
                "system that all of them see"
            )
    else:
        _see_into(collector, denoiser, calibration, layers, todo, transforms, also, progress)
    found = collector.statistics(layers, calibration.timesteps)
    require_reached(layers, {name for name in layers if bool(found.count(name).any())})
    return found


def _see_into(
    collector: Collector,
    denoiser: nn.Module,
    calibration: CalibrationSet,
    layers: Sequence[str],
    timesteps: Sequence[float],
    transforms: Mapping[str, LayerTransform],
    also: Receive | None = None,
    progress: bool = False,
) -> None:
    def receive(layer: str, x: Tensor, timestep: float) -> None:
        collector.see(layer, x, timestep)
        if also is not None:
            also(layer, x, timestep)

    for _ in stream_inputs(
        denoiser,
        calibration,
        layers,
        receive,
        timesteps=timesteps,
        transforms=transforms,
        rows=collector.rows,
        progress=progress,
    ):
        collector.visit(())  # finished: to disk


def _see_timesteps(
    denoiser: nn.Module,
    calibration: CalibrationSet,
    layers: Sequence[str],
    folder: str,
    source: Mapping[str, Any],
    bins: int,
    transforms: Mapping[str, LayerTransform],
    rows: Mapping[str, RowOrder | None],
    timesteps: Sequence[float],
) -> None:
    """A worker's share of `collect`, into files."""
    collector = Collector(folder, source=source, bins=bins)
    collector.rows = rows
    _see_into(collector, denoiser, calibration, layers, timesteps, transforms)
