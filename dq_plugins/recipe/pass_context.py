"""What a pass may read while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel
from torch import nn

from dq_plugins.artifact import Format, UnitResults
from dq_plugins.calibration import CalibrationSet
from dq_plugins.errors import DQError
from dq_plugins.graph import Partition, partition
from dq_plugins.graph.partition import untraced
from dq_plugins.graph.row_order import find_row_orders
from dq_plugins.graph.unsupported_layers import find_unsupported_layers
from dq_plugins.hashing import hash_json
from dq_plugins.plan import QuantPlan, Reason, Targets
from dq_plugins.quantized.layer_transform import LayerTransform
from dq_plugins.quantized.memory import codes_where
from dq_plugins.quantized.sampled import SampledStatistics
from dq_plugins.timesteps import RowOrder

T = TypeVar("T")


@dataclass
class PassContext:
    """Inputs of a pass: the denoiser, the calibration set, targets, the seed, and shared results.

    Attributes:
        denoiser: the full-precision denoiser, frozen and in eval mode. Passes must leave its weights as they are.
        calibration: recorded full-precision denoiser calls, or statistics that were collected while sampling.
        targets: widths and the form of quantizers.
        seed: seed of every random choice.
        running: name of the running pass, which every random stream belongs to.
        transforms: of the inputs of planned layers, by layer; passes that look at inputs or weights look at transformed
            ones.
        workdir: folder of the running pass for intermediate results, so that it can resume; None: no resume.
        statistics_samples: samples that statistics of inputs are of at least, from all recorded calls, each of which
            gives one at least; None: all samples of all calls.
        measurements: seconds, memory and the like by pass name. They differ from run to run, so they stay out of the
            plan.
    """

    denoiser: nn.Module
    calibration: CalibrationSet | SampledStatistics
    targets: Targets = field(default_factory=Targets)
    seed: int = 0
    running: str = ""
    transforms: Mapping[str, LayerTransform] = field(default_factory=dict)
    workdir: Path | None = None
    statistics_samples: int | None = None
    measurements: dict[str, dict[str, float]] = field(default_factory=dict)
    _shared: dict[Any, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def partition(self) -> Partition:
        """Roles and dependency signatures of the denoiser's layers, without those of `left_out`."""
        layers = {name: info for name, info in self.traced.layers.items() if name not in self.left_out}
        return replace(self.traced, layers=layers)

    @cached_property
    def left_out(self) -> dict[str, Reason]:
        """Why a layer of `traced` is not quantized, by layer."""
        found: dict[str, Reason] = {}
        if isinstance(self.calibration, SampledStatistics):
            reasons = {name: self.calibration.left_out(name) for name in self.traced.layers}
            found = {name: reason for name, reason in reasons.items() if reason is not None}
            if self.calibration.example is None or not self.traced.graph:
                return found
        example = self.calibration.example_inputs()
        unsupported = find_unsupported_layers(self.denoiser, example, self.traced.layers)
        return {name: Reason(text, "unsupported") for name, text in unsupported.items()} | found

    @cached_property
    def traced(self) -> Partition:
        """All that the denoiser's graph says; of one that cannot be traced, the layers that were observed."""
        calibration = self.calibration
        if not isinstance(calibration, SampledStatistics):
            return partition(self.denoiser, calibration.example_inputs(), timestep=calibration.timestep_argument)
        if calibration.example is not None:
            try:
                return partition(self.denoiser, dict(calibration.example), timestep=calibration.timestep_argument)
            except DQError:
                pass  # a recording would need the graph; statistics of layers do without, and without roles
        return untraced(self.denoiser, calibration.observed, calibration.timestep_argument)

    @cached_property
    def row_orders(self) -> dict[str, RowOrder | None]:
        """Where the samples of a call are in the inputs of layers, as far as that is known."""
        return self._find_row_orders(self.partition.layers)

    def find_row_orders(self, modules: Iterable[str]) -> dict[str, RowOrder | None]:
        """Where they are in the inputs of other modules; `row_orders` has them, too, from then on."""
        self.row_orders.update(self._find_row_orders(modules))
        return self.row_orders

    def _find_row_orders(self, modules: Iterable[str]) -> dict[str, RowOrder | None]:
        calibration, part = self.calibration, self.partition
        if isinstance(calibration, SampledStatistics) and calibration.example is None:
            return {}
        example = calibration.example_inputs()
        return find_row_orders(self.denoiser, example, part.timestep, part.sample_argument, modules)

    def stream(self, *names: str) -> int:
        """Seed of a random stream of the running pass, below 2^63; other names, or another pass, another stream.

        Args:
            names: what the random numbers are for, such as the name of a block; sizes tell nothing apart.
        """
        return int(hash_json([self.seed, self.running, *names])[:16], 16) % 2**63

    def generator(self, *names: str) -> torch.Generator:
        """A CPU random generator of the running pass, seeded with `stream`."""
        return torch.Generator().manual_seed(self.stream(*names))

    def finished(self, format: Format[T], plan: QuantPlan, options: BaseModel) -> UnitResults[T]:
        """Results of the running pass's units that are finished, kept in `workdir`.

        Args:
            format: of the results.
            plan: as the pass was given it; results for another one are not used.
            options: of the pass; likewise.
        """
        settings = {"plan": plan.hash, "options": options, "seed": self.seed, "calibration": self.calibration.hash}
        return UnitResults(format, self.workdir, settings, codes_where(self.denoiser))

    def shared(self, key: Any, compute: Callable[[], T]) -> T:
        """Result of ``compute``, kept for later passes of the same run under a hashable ``key``."""
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]
