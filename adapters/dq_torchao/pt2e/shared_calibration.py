"""What the observers of one exported denoiser share: statistics by timestep, then groups and tables."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dq_plugins.affine import affine_parameters
from dq_plugins.errors import CalibrationError
from dq_plugins.passes.activations import DEFAULT_GROUPS, input_ranges
from dq_plugins.plan import ActivationQuant, RangeMethods, Targets
from dq_plugins.quantized.sampled import SampledStatistics
from dq_plugins.quantized.statistics import Collector
from dq_plugins.recipe import PassContext, Recipe, Step, make_plan
from dq_plugins.timesteps import TimestepGroups

BITS = 8


@dataclass(frozen=True)
class Tables:
    """Parameters of every observed activation ``l`` in every group ``g``.

    Attributes:
        groups: the timestep groups.
        scale: float32 ``[G, L]``.
        zero_point: float32 ``[G, L]``, signed.
    """

    groups: TimestepGroups
    scale: Tensor
    zero_point: Tensor


@dataclass
class SharedCalibration:
    """State that the observers of one graph share; copies of an observer share it too.

    Attributes:
        groups: largest number of timestep groups.
        power: p of the error norm that ranges minimise.
        symmetric: of every observer so far, whether its zero point is fixed at 0; each has a column of the tables.
        collector: statistics by column and timestep.
        timestep: of the call that runs.
    """

    groups: int
    power: float = 2.0
    symmetric: list[bool] = field(default_factory=list)
    collector: Collector = field(default_factory=Collector)
    timestep: Tensor = field(default_factory=lambda: torch.zeros(1))
    _tables: Tables | None = None

    def new_column(self, symmetric: bool) -> int:
        """Column of a new observer."""
        self.symmetric.append(symmetric)
        return len(self.symmetric) - 1

    def begin(self, timestep: Tensor) -> None:
        """A call at ``timestep`` starts: a number, or one per sample."""
        self.timestep = timestep.detach().reshape(-1)

    def observe(self, column: int, x: Tensor) -> None:
        """See an activation."""
        self.collector.see(str(column), x, self.timestep)

    def tables(self) -> Tables:
        """Groups with the least error, and the parameters of every column; computed once."""
        if self._tables is None:
            self._tables = self._compute()
        return self._tables

    def _compute(self) -> Tables:
        if not self.collector.timesteps:
            raise CalibrationError(
                "the prepared graph has not run, so nothing is known about its activations: sample with it before "
                "convert_pt2e"
            )
        # a graph has no modules: its activations stand for layers, in a denoiser without any
        columns = {str(column): BITS for column in range(len(self.symmetric))}
        source = SampledStatistics(self.collector, dict.fromkeys(columns, "linear"), "timestep")
        nothing, power = nn.Module(), {"power": self.power}
        steps = Step("timestep-groups", {"groups": self.groups, **power}), Step("activation-ranges", power)
        plan = make_plan(nothing, source, Recipe("pt2e", "", steps), act_bits=BITS, progress=False)
        # a graph has places for ranges alone, of one timestep a call
        plan.refuse_unimplemented(("row_order",), "PT2E")
        groups = plan.groups[DEFAULT_GROUPS]
        # inputs of convolutions may have zero points fixed at 0, beside others that have not
        fixed = PassContext(nothing, source, Targets(act_bits=BITS, symmetric_acts=True))
        ranges = input_ranges(fixed, columns, groups, RangeMethods(power=self.power))
        parameters = []
        for name, symmetric in zip(columns, self.symmetric, strict=True):
            chosen = plan.layers[name].activation
            assert isinstance(chosen, ActivationQuant)
            own = affine_parameters(*ranges[name], BITS, symmetric=True)
            parameters.append(own if symmetric else (chosen.scale, chosen.zero_point))
        scale, zero_point = (torch.stack(column, 1) for column in zip(*parameters, strict=True))  # [G, L]
        return Tables(groups, scale, zero_point.float())

    def __deepcopy__(self, memo: object) -> SharedCalibration:
        return self


class TimestepRecorder(nn.Module):
    """Tells the observers which timestep runs; in the graph between the timestep argument and its users."""

    def __init__(self, shared: SharedCalibration) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, timestep: Tensor) -> Tensor:
        """The timestep, unchanged."""
        self.shared.begin(timestep)
        return timestep
