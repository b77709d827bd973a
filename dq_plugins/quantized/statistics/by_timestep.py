"""What collected statistics say: ends, powers and errors of ranges, of every layer at every timestep.

Shapes: ``T`` timesteps, ``C`` candidate ranges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from dq_plugins.errors import CalibrationError
from dq_plugins.hashing import hash_json
from dq_plugins.observers.candidate_ranges import candidate_ranges
from dq_plugins.observers.error import ErrorTable, range_errors
from dq_plugins.quantized.statistics.input_statistics import TIMESTEP, InputStatistics, LayerRecord


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
