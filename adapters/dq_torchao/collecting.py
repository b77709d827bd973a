"""Statistics of layer inputs by timestep, streamed while a pipeline samples.

Sampling visits every timestep once per prompt, so statistics are revisited: those of the running call's timesteps are
in memory, all others lie in a temporary folder, one safetensors file a timestep. Memory does not grow with steps or
prompts.

Shapes: ``T`` timesteps, ``C`` candidate ranges.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from dq_plugins.errors import CalibrationError
from dq_plugins.observers import ErrorTable
from dq_plugins.observers.candidates import candidate_ranges
from dq_plugins.observers.error import range_errors
from dq_plugins.observers.histogram import Histogram

BINS = 2048  # 8 for each level of an 8-bit quantizer


class InputStatistics:
    """Count, extremes, sum of squares and histogram of one layer's inputs at one timestep."""

    def __init__(self) -> None:
        self.histogram = Histogram(BINS)
        self.low, self.high = torch.inf, -torch.inf
        self.count, self.squares = 0, 0.0

    def update(self, x: Tensor) -> None:
        """See the values of ``x``.

        Raises:
            CalibrationError: a value is NaN or infinite.
        """
        values = x.detach().reshape(-1).float()
        low, high = (float(v) for v in values.aminmax())
        if not (torch.isfinite(values.new_tensor([low, high])).all()):
            raise CalibrationError(
                f"{int((~torch.isfinite(values)).sum())} of {values.numel()} inputs are NaN or infinite; run the "
                "full-precision model in float32 and see where they come from"
            )
        self.histogram.update(values, low, high)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.count += values.numel()
        self.squares += float(values.double().square().sum())

    def tensors(self) -> dict[str, Tensor]:
        """Everything, to be written."""
        h = self.histogram
        return {
            "lattice": torch.tensor([h.exponent, h.first, self.count]),
            "summary": torch.tensor([self.low, self.high, self.squares], dtype=torch.float64),
            "counts": h.counts.clone(),
            "sums": h.sums.clone(),
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> InputStatistics:
        """What `tensors` gave."""
        statistics = cls()
        h = statistics.histogram
        h.exponent, h.first, statistics.count = (int(v) for v in tensors["lattice"])
        statistics.low, statistics.high, statistics.squares = (float(v) for v in tensors["summary"])
        h.counts, h.sums = tensors["counts"].clone(), tensors["sums"].clone()
        return statistics


class StatisticsStore:
    """Statistics of many layers at many timesteps, in memory only for the timesteps that are open."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="dq-torchao-")
        self._open: dict[float, dict[str, InputStatistics]] = {}
        self._known: set[float] = set()

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Timesteps seen, ascending."""
        return tuple(sorted(self._known))

    def open(self, timesteps: Iterable[float]) -> None:
        """Have the statistics of these timesteps in memory, and no others."""
        wanted = set(timesteps)
        for timestep in set(self._open) - wanted:
            layers = self._open.pop(timestep)
            tensors = {f"{name}/{part}": x for name, s in layers.items() for part, x in s.tensors().items()}
            safetensors.torch.save_file(tensors, self._path(timestep))
        for timestep in wanted - set(self._open):
            path = self._path(timestep)
            self._open[timestep] = self._read(path) if path.exists() else {}

    def update(self, layer: str, timestep: float, x: Tensor) -> None:
        """See an input of ``layer``; a timestep that is not open is opened instead of the others."""
        if timestep not in self._open:
            self.open([timestep])
        self._known.add(timestep)
        self._open[timestep].setdefault(layer, InputStatistics()).update(x)

    def at(self, timestep: float) -> dict[str, InputStatistics]:
        """Statistics of every layer that ran at ``timestep``; no other timestep stays open."""
        self.open([timestep])
        return self._open[timestep]

    def _path(self, timestep: float) -> Path:
        return Path(self._folder.name) / f"{timestep!r}.safetensors"

    @staticmethod
    def _read(path: Path) -> dict[str, InputStatistics]:
        with safe_open(path, framework="pt") as file:
            names = sorted({key.rpartition("/")[0] for key in file.keys()})  # noqa: SIM118  (not a dict)
            parts = ("lattice", "summary", "counts", "sums")
            return {n: InputStatistics.of({part: file.get_tensor(f"{n}/{part}") for part in parts}) for n in names}

    def error_tables(self, layers: Iterable[str], bits: int, *, symmetric: bool, power: float) -> dict[str, ErrorTable]:
        """Errors of ranges worth trying, for every layer that ran; a timestep where it did not run costs nothing.

        Args:
            layers: names.
            bits: width of the quantizer.
            symmetric: whether its zero point is 0.
            power: p of the error norm ``|x - x^|^p``.
        """
        extremes: dict[str, list[tuple[float, float, int, float]]] = {layer: [] for layer in layers}
        for timestep in self.timesteps:
            for layer, s in self.at(timestep).items():
                if layer in extremes:
                    extremes[layer].append((s.low, s.high, s.count, s.squares))
        seen = {layer: torch.tensor(rows, dtype=torch.float64) for layer, rows in extremes.items() if rows}
        ranges = {layer: candidate_ranges(rows[:, 0], rows[:, 1], symmetric=symmetric) for layer, rows in seen.items()}
        errors = {n: torch.zeros(len(self.timesteps), len(low), dtype=torch.float64) for n, (low, _) in ranges.items()}
        for index, timestep in enumerate(self.timesteps):
            for layer, s in self.at(timestep).items():
                if layer not in errors:
                    continue
                points = s.histogram.points()
                errors[layer][index] = range_errors(*points, *ranges[layer], bits, symmetric=symmetric, power=power)
        power_of = {layer: float(rows[:, 3].sum() / rows[:, 2].sum()) for layer, rows in seen.items()}
        return {layer: ErrorTable(*ranges[layer], errors[layer], power_of[layer]) for layer in seen}
