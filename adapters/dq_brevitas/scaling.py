"""Scale and zero point per timestep group, as ``scaling_impl`` and ``zero_point_impl`` of a Brevitas quantizer.

The argument names are those by which Brevitas' dependency injection finds the parts.
"""

from __future__ import annotations

from dq_brevitas import host  # noqa: F401  isort: skip
import torch
from brevitas.core.function_wrapper import OverBatchOverTensorView
from brevitas.core.restrict_val import FloatRestrictValue, _ClampValue, _RestrictValue
from brevitas.core.stats import DEFAULT_MOMENTUM, SCALAR_SHAPE, _Stats
from brevitas.core.zero_point import _ScaleShiftZeroPoint
from brevitas.function import abs_binary_sign_grad
from torch import Tensor, nn

from dq_brevitas.table import Reduction, TimestepTable
from dq_plugins.timesteps import RowOrder, TimestepContext


class TimestepScaling(TimestepTable):
    """One scale per timestep group. Maps to ``scaling_impl``.

    ``scale[g] = restrict(value[g]) / int_threshold``, as Brevitas' ``ParameterFromRuntimeStatsScaling``, which has the
    other arguments too.

    Args:
        timestep_context: context of the denoiser.
        timestep_groups: name of the groups in it.
        timestep_reduction: ``"mean"`` or ``"max"`` over calls.
        scaling_table_init: ``[G]`` known values of ``scale * int_threshold``.
        timestep_rows: where the samples of a call are in what is quantized.
    """

    def __init__(
        self,
        timestep_context: TimestepContext,
        timestep_groups: str,
        collect_stats_steps: int = 300,
        scaling_stats_impl: nn.Module | None = None,
        scaling_stats_input_view_shape_impl: nn.Module = OverBatchOverTensorView(),  # noqa: B008
        restrict_scaling_impl: nn.Module = FloatRestrictValue(),  # noqa: B008
        scaling_stats_momentum: float | None = DEFAULT_MOMENTUM,
        scaling_min_val: float | None = None,
        timestep_reduction: Reduction = "mean",
        scaling_table_init: Tensor | None = None,
        timestep_rows: RowOrder | None = None,
    ) -> None:
        super().__init__(
            timestep_context,
            timestep_groups,
            collect_stats_steps,
            scaling_stats_momentum,
            timestep_reduction,
            None if scaling_stats_impl is None else _Stats(scaling_stats_impl, SCALAR_SHAPE),
            scaling_stats_input_view_shape_impl,
            empty=1.0,
            initial=scaling_table_init,
            write=restrict_scaling_impl.restrict_init_module(),
            read=_RestrictValue(restrict_scaling_impl),
            rows=timestep_rows,
        )
        self.clamp_scaling = _ClampValue(scaling_min_val)

    def statistic(self, x: Tensor) -> Tensor:
        """Statistic of one batch, clamped to the least scale."""
        return self.clamp_scaling(super().statistic(x))

    def scales(self, threshold: Tensor) -> Tensor:
        """``[G]`` scales of all groups."""
        return self.clamp_scaling(self.entries() / self.read(self.write(threshold)))

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """Scale of the samples of ``x``: 0-d for one timestep, ``[N, 1, ..., 1]`` for one per sample."""
        if threshold is None:
            threshold = torch.ones((), dtype=x.dtype, device=x.device)
        if self.training and self.collecting:
            if self.local_loss_mode:
                return self.statistic(x) / threshold
            return self.select(self.observe(x) / threshold, x)
        return self.select(self.scales(threshold), x)

    init_scale = TimestepTable.finish  # what ``calibration_mode`` calls at its end


class TimestepZeroPoint(TimestepTable):
    """One zero point per timestep group. Maps to ``zero_point_impl``.

    As Brevitas' ``ParameterFromRuntimeZeroPoint``, which has the other arguments too, the parameter is the float value
    of the smallest code, so that the integer zero point follows when the scale trains.

    Args:
        timestep_context: context of the denoiser.
        timestep_groups: name of the groups in it.
        timestep_reduction: ``"mean"`` or ``"max"`` over calls.
        zero_point_table_init: ``[G]`` known values of ``scale * zero_point``.
        timestep_rows: where the samples of a call are in what is quantized.
    """

    def __init__(
        self,
        timestep_context: TimestepContext,
        timestep_groups: str,
        int_quant: nn.Module,
        quantize_zero_point: bool = True,
        collect_stats_steps: int = 300,
        zero_point_stats_impl: nn.Module | None = None,
        zero_point_stats_input_view_shape_impl: nn.Module = OverBatchOverTensorView(),  # noqa: B008
        zero_point_stats_momentum: float | None = DEFAULT_MOMENTUM,
        timestep_reduction: Reduction = "mean",
        zero_point_table_init: Tensor | None = None,
        timestep_rows: RowOrder | None = None,
    ) -> None:
        super().__init__(
            timestep_context,
            timestep_groups,
            collect_stats_steps,
            zero_point_stats_momentum,
            timestep_reduction,
            zero_point_stats_impl,
            zero_point_stats_input_view_shape_impl,
            empty=0.0,
            initial=zero_point_table_init,
            rows=timestep_rows,
        )
        self.scale_shift_zero_point = _ScaleShiftZeroPoint(int_quant, quantize_zero_point)

    def zero_points(self, scales: Tensor, bit_width: Tensor) -> Tensor:
        """``[G]`` zero points of all groups, given the scales ``[G]``."""
        return self.scale_shift_zero_point(abs_binary_sign_grad(self.entries()), scales, bit_width)

    def forward(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        """Zero point of the samples of ``x``, in the shape of ``scale``."""
        if self.training and self.collecting:
            chosen = self.statistic(x).reshape(()) if self.local_loss_mode else self.select(self.observe(x), x)
        else:
            chosen = self.select(self.entries(), x)
        return self.scale_shift_zero_point(abs_binary_sign_grad(chosen), scale, bit_width)

    init_zp = TimestepTable.finish  # what ``calibration_mode`` calls at its end
