"""A learned number per timestep group, initialised from statistics the way Brevitas initialises its scalar ones.

Life of a table, as in `brevitas.core.scaling.ParameterFromRuntimeStatsScaling`, but per group:

1. collecting: in training mode (which ``calibration_mode`` switches on) a call updates the running statistic of the
   groups it visits, and uses the statistic of this very batch;
2. finished: after ``collect_stats_steps`` calls of a group, or at the end of ``calibration_mode``, the group's running
   statistic becomes its entry of the parameter ``value``, which trains like any other.

``calibration_mode`` recognises a table by its attributes ``collect_stats_steps`` and ``momentum`` and by the method
``init_scale`` or ``init_zp``; MSE searches by ``local_loss_mode``. Nothing else of Brevitas needs to know.

Shapes: ``G`` groups, index ``[1]`` (whole batch) or ``[B]`` (per sample).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

from dq_brevitas import host  # noqa: F401  isort: skip
import brevitas.config as brevitas_config
import torch
from torch import Tensor, nn

from dq_plugins.errors import CalibrationError, DQWarning
from dq_plugins.timesteps import RowOrder, TimestepContext, select_for_input

Reduction = Literal["mean", "max"]


class TimestepTable(nn.Module):
    """Base of the scale table and the zero-point table.

    Args:
        context: the context of the denoiser this table is part of.
        groups: name of the timestep groups that index the table.
        steps: calls of a group in training mode during which its statistic is collected.
        momentum: weight of the newest call in the running statistic; None averages (``calibration_mode`` sets that).
        reduction: ``"mean"`` as Brevitas, or ``"max"`` for the largest call, which a finite set of inputs wants.
        stats: the 0-d statistic of what ``view`` makes of a batch; None for a table that only knows ``initial``.
        view: applied to the batch first.
        empty: entry of a group of which nothing is known.
        initial: ``[G]`` known entries; collecting is skipped unless `restart` is called.
        write: entries -> parameter (a power-of-two scale is learned as its logarithm).
        read: parameter -> entries.
        rows: where the samples of a call are in what is quantized; None: not known.
    """

    dq_quantizer_state = True

    def __init__(
        self,
        context: TimestepContext,
        groups: str,
        steps: int,
        momentum: float | None,
        reduction: Reduction,
        stats: nn.Module | None,
        view: nn.Module,
        *,
        empty: float,
        initial: Tensor | None,
        write: nn.Module | None = None,
        read: nn.Module | None = None,
        rows: RowOrder | None = None,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "max"):
            raise CalibrationError(f"timestep_reduction is 'mean' or 'max', got {reduction!r}")
        size = len(context.groups[groups])
        if initial is not None and initial.shape != (size,):
            raise CalibrationError(
                f"timestep groups {groups!r} are {size}, but the initial table has shape {tuple(initial.shape)}"
            )
        self.context, self.groups, self.rows = context, groups, rows
        self.collect_stats_steps, self.momentum, self.reduction = steps, momentum, reduction
        self.local_loss_mode = False
        self.stats, self.view = stats, view
        self.write, self.read = write or nn.Identity(), read or nn.Identity()
        self.counts = [0] * size
        self.collecting, self.known = initial is None, initial is not None
        start = torch.full((size,), empty) if initial is None else initial.detach().float().clone()
        self.register_buffer("buffer", start, persistent=False)
        self.value = nn.Parameter(self.write(start.clone()))

    def statistic(self, x: Tensor) -> Tensor:
        """The 0-d statistic of one batch."""
        if self.stats is None:
            raise CalibrationError(
                "this timestep quantizer was made from known ranges and has no statistic to calibrate with; build it "
                "with .let(scaling_stats_op=StatsOp.MAX), or from ShiftedUint8ActPerTimestepFloat for a zero point"
            )
        return self.stats(self.view(x))

    def entries(self) -> Tensor:
        """``[G]`` entries inference uses now."""
        return self.read(self._parameter())

    def select(self, table: Tensor, x: Tensor) -> Tensor:
        """Entries of the samples of ``x``: 0-d, or ``[N, 1, ..., 1]``."""
        return select_for_input(table, self.context.index(self.groups).to(table.device), x, rows=self.rows)

    @torch.compiler.disable
    def observe(self, x: Tensor) -> Tensor:
        """Update the running statistics; the ``[G]`` entries this batch is quantized with."""
        table = self.entries()
        for group, rows in self._rows(x):
            if self.counts[group] >= self.collect_stats_steps:
                continue
            found = self.statistic(rows).reshape(())
            self._accumulate(group, found.detach())
            where = torch.tensor([group], device=table.device)
            table = table.index_put((where,), found.to(table).reshape(1))
        if min(self.counts) >= self.collect_stats_steps:
            self.finish()
        return table + 0.0 * self.value.sum()  # a parameter without gradient makes distributed training wait for it

    def finish(self) -> None:
        """End collecting: running statistics become the parameter. Nothing happens before the first call."""
        if not self.collecting or not (self.known or any(self.counts)):
            return
        empty = [g for g, n in enumerate(self.counts) if n == 0]
        if empty and any(self.counts):
            source = "their previous ranges" if self.known else "the ranges of the nearest calibrated group"
            warnings.warn(
                f"timestep groups {empty} of {len(self.counts)} ({self.groups!r}) saw no calibration data and keep "
                f"{source}. Calibrate on a schedule that visits every group, or use fewer groups.",
                DQWarning,
                stacklevel=2,
            )
        with torch.no_grad():
            self.value.copy_(self._parameter())
        self.collecting, self.known = False, True

    def restart(self) -> None:
        """Collect again, from the entries there are: a group that sees no data keeps its entry."""
        with torch.no_grad():
            self.buffer.copy_(self.entries())
        self.known = self.known or any(n > 0 for n in self.counts)
        self.counts, self.collecting = [0] * len(self.counts), True

    def _rows(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        numbers = torch.arange(len(self.counts), device=x.device)
        rows = self.select(numbers, x)
        if rows.numel() == 1:
            yield int(rows), x
            return
        rows = rows.reshape(rows.shape[:2] if rows.dim() > 1 and rows.shape[1] > 1 else -1)  # [S, B] or [N]
        for group in rows.unique().tolist():
            yield group, x[rows == group]

    def _accumulate(self, group: int, found: Tensor) -> None:
        entry, n = self.buffer[group], self.counts[group]
        if n == 0:
            entry.copy_(found)
        elif self.reduction == "max":
            entry.copy_(torch.where(found.abs() > entry.abs(), found, entry))
        elif self.momentum is None:
            entry.mul_(n / (n + 1)).add_(found / (n + 1))
        else:
            entry.mul_(1 - self.momentum).add_(self.momentum * found)
        self.counts[group] = n + 1
        if self.counts[group] == self.collect_stats_steps:
            with torch.no_grad():
                self.value[group] = self.write(entry)

    def _parameter(self) -> Tensor:
        """``[G]`` parameter: what is learned, or still collected."""
        if not self.collecting:
            return self.value
        finished = torch.tensor([n >= self.collect_stats_steps for n in self.counts], device=self.value.device)
        return torch.where(finished, self.value, self.write(self._filled()))

    def _filled(self) -> Tensor:
        """Running statistics, those of unseen groups taken from the nearest seen one."""
        seen = [g for g, n in enumerate(self.counts) if n]
        if self.known or not seen:
            return self.buffer
        nearest = [min(seen, key=lambda s: abs(s - g)) for g in range(len(self.counts))]
        return self.buffer[torch.tensor(nearest, device=self.buffer.device)]

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As Brevitas: the entries in use, or no key at all while nothing is known."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if not self.collecting:
            return state
        if self.known or any(self.counts) or brevitas_config._FULL_STATE_DICT:
            state[prefix + "value"] = self._parameter().detach()
        else:
            del state[prefix + "value"]
        return state

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "value"
        if key in state_dict and state_dict[key].dim() == 0:  # a checkpoint of the stock, per-tensor quantizer
            state_dict[key] = state_dict[key].expand(self.value.shape).clone()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key in state_dict:
            self.collecting, self.known = False, True
        elif brevitas_config.IGNORE_MISSING_KEYS and key in missing_keys:
            missing_keys.remove(key)
