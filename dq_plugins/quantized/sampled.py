"""Statistics that were collected while a pipeline sampled, in the place of a calibration set.

Recipes whose passes ask for statistics of layers' inputs only (weight ranges, timestep groups, activation ranges) run
on them as on recorded calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

from dq_plugins.calibration.calibration_set import timestep_range
from dq_plugins.errors import RecipeError
from dq_plugins.plan import Reason
from dq_plugins.quantized.statistics import Collector, Statistics
from dq_plugins.timesteps import Schedule

NOT_OBSERVED = Reason("it was not among the layers to quantize", "asked")
DID_NOT_RUN = Reason("it did not run during calibration", "unused")


@dataclass(frozen=True)
class SampledStatistics:
    """What `dq_plugins.make_plan` takes instead of recorded calls.

    Attributes:
        collector: what was seen.
        observed: kind of every layer that was observed, by its name in the denoiser and in the collector.
        timestep_argument: name of the denoiser's argument that carries the timestep.
        example: arguments of one call, to trace the denoiser with; None: layers have no roles.
    """

    collector: Collector
    observed: Mapping[str, str]
    timestep_argument: str
    example: Mapping[str, Any] | None = field(default=None, repr=False)

    @cached_property
    def statistics(self) -> Statistics:
        """Of the layers that ran."""
        found = self.collector.statistics(tuple(self.observed))
        ran = [name for name in self.observed if bool(found.count(name).any())]
        return self.collector.statistics(ran)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Distinct timesteps, ascending."""
        return self.collector.timesteps

    @property
    def timestep_range(self) -> tuple[float, float]:
        """See `CalibrationSet.timestep_range`."""
        return timestep_range(self.timesteps)

    @property
    def schedule(self) -> Schedule:
        """The timesteps as sampling visits them, descending: in which order it did is not known."""
        return Schedule(self.timesteps[::-1])

    @cached_property
    def hash(self) -> str:
        """sha256 of everything that was seen."""
        return self.statistics.hash

    def check_model(self, model_hash: str) -> None:
        """Nothing to check: the denoiser itself was observed."""

    def example_inputs(self) -> dict[str, Any]:
        """Arguments of one call."""
        if self.example is None:
            self._not_recorded()
        return dict(self.example)

    def left_out(self, layer: str) -> Reason | None:
        """Why nothing is known about a layer; None where something is."""
        if layer not in self.observed:
            return NOT_OBSERVED
        return None if layer in self.statistics.layers else DID_NOT_RUN

    def _not_recorded(self, *_: Any, **__: Any) -> NoReturn:
        raise RecipeError(
            "a pass of this recipe needs recorded calls, and all there is are statistics of layers' inputs that were "
            "collected while sampling. Take a recipe of ranges and groups alone, such as 'fast' or 'ranges', or "
            "record calls with dq_plugins.record and make the plan from them"
        )

    call = calls = count = subset = spread = _not_recorded
