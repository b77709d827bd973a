"""What the observers of one exported denoiser share: statistics by timestep, then groups and tables."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dq_plugins.affine import affine_parameters
from dq_plugins.errors import CalibrationError
from dq_plugins.observers import ErrorTable, optimal_groups
from dq_plugins.timesteps import TimestepGroups
from dq_torchao.calibration import validity
from dq_torchao.collecting import StatisticsStore

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
        store: statistics by column and timestep.
        timesteps: of the call that runs.
    """

    groups: int
    power: float = 2.0
    symmetric: list[bool] = field(default_factory=list)
    store: StatisticsStore = field(default_factory=StatisticsStore)
    timesteps: list[float] = field(default_factory=list)
    _tables: Tables | None = None

    def new_column(self, symmetric: bool) -> int:
        """Column of a new observer."""
        self.symmetric.append(symmetric)
        return len(self.symmetric) - 1

    def begin(self, timestep: Tensor) -> None:
        """A call at ``timestep`` starts: a number, or one per sample."""
        self.timesteps = timestep.reshape(-1).float().tolist()
        self.store.open(self.timesteps)

    def observe(self, column: int, x: Tensor) -> None:
        """See an activation."""
        parts = [x] if len(set(self.timesteps)) == 1 else x.chunk(len(self.timesteps))
        for timestep, part in zip(self.timesteps, parts, strict=False):
            self.store.update(str(column), timestep, part)

    def tables(self) -> Tables:
        """Groups with the least error, and the parameters of every column; computed once."""
        if self._tables is None:
            self._tables = self._compute()
        return self._tables

    def _compute(self) -> Tables:
        timesteps = self.store.timesteps
        if not timesteps:
            raise CalibrationError(
                "the prepared graph has not run, so nothing is known about its activations: sample with it before "
                "convert_pt2e"
            )
        errors = self._error_tables()
        grouping = optimal_groups(errors, timesteps, max_groups=self.groups, bounds=validity(timesteps))
        ranges = grouping.ranges(self.groups)
        parameters = [
            affine_parameters(*ranges[str(column)], BITS, symmetric=symmetric)
            for column, symmetric in enumerate(self.symmetric)
        ]
        scale, zero_point = (torch.stack(column, 1) for column in zip(*parameters, strict=True))
        return Tables(grouping.groups(self.groups), scale, zero_point.float())

    def _error_tables(self) -> dict[str, ErrorTable]:
        found: dict[str, ErrorTable] = {}
        for symmetric in (True, False):
            names = [str(column) for column, flag in enumerate(self.symmetric) if flag is symmetric]
            found.update(self.store.error_tables(names, BITS, symmetric=symmetric, power=self.power))
        return found

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
