"""What is known about the inputs of every layer at every timestep, after one pass over the calibration set.

For each (layer, timestep) the exact count, minimum, maximum and mean square are kept, and a histogram of at most a few
thousand weighted values, from which the error of any candidate range at any width follows with the quantizer that
executes. Histograms exist in memory for one timestep at a time; finished ones lie on disk, one file a timestep.

Shapes: ``T`` timesteps, ``C`` candidate ranges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dq_plugins.atomic import write_atomically
from dq_plugins.calibration import CalibrationSet
from dq_plugins.errors import CalibrationError
from dq_plugins.observers.base import Observer
from dq_plugins.observers.candidates import candidate_ranges
from dq_plugins.observers.distribution import BINS
from dq_plugins.observers.error import range_errors
from dq_plugins.observers.histogram import Histogram
from dq_plugins.observers.streaming import stream_inputs


@dataclass(frozen=True)
class ErrorTable:
    """Errors of candidate ranges of one layer; the error of a group of timesteps is a sum of rows.

    Attributes:
        low: lower bounds of the candidates ``[C]``.
        high: upper bounds of the candidates ``[C]``.
        error: mean error per value at each timestep for each candidate, float64 ``[T, C]``.
        power: mean square of the layer's inputs over all timesteps; the scale that errors are compared by.
    """

    low: Tensor
    high: Tensor
    error: Tensor
    power: float


class _Collector(Observer):
    """Everything the statistics hold about one layer at one timestep."""

    name = "statistics"

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.histogram = Histogram(bins)
        self.squares = 0.0

    def observe(self, values: Tensor) -> None:
        self.histogram.update(values, *(float(v) for v in values.aminmax()))
        self.squares += float(values.double().square().sum())

    def absorb(self, other: _Collector) -> None:
        self.histogram.merge(other.histogram)
        self.squares += other.squares

    def choose_range(self) -> tuple[float, float]:
        return self.low, self.high

    def tensors(self, layer: str) -> dict[str, Tensor]:
        values, weights = self.histogram.points()
        summary = torch.tensor([self.count, self.low, self.high, self.squares / self.count], dtype=torch.float64)
        return {f"{layer}/values": values, f"{layer}/weights": weights, f"{layer}/summary": summary}


class Statistics:
    """Statistics of layers' inputs by timestep; made by `collect`.

    Attributes:
        layers: fully qualified names.
        timesteps: ascending.
    """

    def __init__(self, folder: Path, layers: Sequence[str], timesteps: Sequence[float], owner: object = None) -> None:
        """``owner`` is kept alive with the statistics: the temporary folder, if it is one."""
        self.layers = tuple(layers)
        self.timesteps = tuple(timesteps)
        self._owner = owner
        self._files = [safe_open(_file(folder, t), framework="pt") for t in self.timesteps]

    @cached_property
    def _summaries(self) -> dict[str, Tensor]:
        return {
            layer: torch.stack([file.get_tensor(f"{layer}/summary") for file in self._files]) for layer in self.layers
        }

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

    def points(self, layer: str, index: int) -> tuple[Tensor, Tensor]:
        """Weighted values at the timestep with this index: float32 ``[N]`` ascending, and float64 ``[N]``."""
        self._summary(layer)
        file = self._files[index]
        # Cloned out of the mapped file into aligned memory.
        return file.get_tensor(f"{layer}/values").clone(), file.get_tensor(f"{layer}/weights").clone()

    def errors(
        self,
        layer: str,
        low: Tensor,
        high: Tensor,
        bits: int,
        *,
        symmetric: bool = True,
        power: float = 2.0,
    ) -> Tensor:
        """Mean ``|x - x^|^power`` at each timestep for given ranges ``[C]``: float64 ``[T, C]``."""
        rows = [
            range_errors(*self.points(layer, i), low, high, bits, symmetric=symmetric, power=power)
            for i in range(len(self.timesteps))
        ]
        return torch.stack(rows)

    def error_table(self, layer: str, bits: int, *, symmetric: bool = True, power: float = 2.0) -> ErrorTable:
        """Errors of ranges worth trying; see `dq_plugins.observers.candidates`.

        Args:
            layer: fully qualified name.
            bits: width of the quantizer.
            symmetric: whether its zero point is fixed at 0.
            power: p of the error norm.
        """
        low, high = candidate_ranges(self.low(layer), self.high(layer), symmetric=symmetric)
        error = self.errors(layer, low, high, bits, symmetric=symmetric, power=power)
        return ErrorTable(low, high, error, float(self.mean_square(layer).mean()))

    def error_tables(
        self, bits: int | Mapping[str, int], *, symmetric: bool = True, power: float = 2.0
    ) -> dict[str, ErrorTable]:
        """`error_table` of every layer; ``bits`` may differ by layer."""
        width = bits if isinstance(bits, Mapping) else dict.fromkeys(self.layers, bits)
        return {layer: self.error_table(layer, width[layer], symmetric=symmetric, power=power) for layer in self.layers}


def collect(
    denoiser: nn.Module,
    calibration: CalibrationSet,
    layers: Sequence[str],
    *,
    folder: str | Path | None = None,
    bins: int = BINS,
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
        progress: show a progress bar.

    Raises:
        CalibrationError: a layer does not exist, did not run at some timestep, or its input is not finite.
    """
    owner = TemporaryDirectory(prefix="dq-statistics-") if folder is None else None
    root = Path(owner.name if owner is not None else str(folder))
    root.mkdir(parents=True, exist_ok=True)
    source = {"calibration": calibration.hash, "layers": json.dumps(list(layers)), "bins": str(bins)}
    todo = [t for t in calibration.timesteps if not _is_done(_file(root, t), source)]
    current: dict[str, _Collector] = {}

    def receive(layer: str, x: Tensor) -> None:
        if layer not in current:
            current[layer] = _Collector(bins)
        current[layer].update(x)

    for t in stream_inputs(denoiser, calibration, layers, receive, timesteps=todo, progress=progress):
        tensors = {key: x for layer in layers for key, x in current[layer].tensors(layer).items()}
        write_atomically(_file(root, t), safetensors.torch.save(tensors, metadata=source))
        current.clear()
    return Statistics(root, layers, calibration.timesteps, owner)


def _file(folder: Path, timestep: float) -> Path:
    return folder / f"timestep-{timestep!r}.safetensors"


def _is_done(path: Path, source: dict[str, str]) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() == source
    except (OSError, SafetensorError):
        return False  # absent, or not one of ours: written anew
