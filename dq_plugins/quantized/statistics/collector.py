"""How statistics of layers' inputs are gathered: from calls that somebody runs, or from recorded ones.

Histograms exist in memory for the timesteps of the running call only; all others lie on disk, one file a timestep, and
are read back when their timestep is visited again, as every further prompt of a sampling run does. Memory does not
grow with steps or prompts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.artifact import UnitResults
from dq_plugins.calibration import CalibrationSet
from dq_plugins.errors import CalibrationError
from dq_plugins.observers.distribution import BINS
from dq_plugins.observers.streaming import Receive, located, require_reached, stream_inputs
from dq_plugins.quantized.layer_transform import LayerTransform
from dq_plugins.quantized.statistics.by_timestep import Statistics
from dq_plugins.quantized.statistics.input_statistics import TIMESTEP, InputStatistics
from dq_plugins.scratch import Scratch
from dq_plugins.timesteps import RowOrder, by_sample_or_token, fit_to_input
from dq_plugins.workers import pool, shares


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
