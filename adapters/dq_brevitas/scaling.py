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
from dq_plugins.errors import CalibrationError
from dq_plugins.timesteps import TimestepContext


class TimestepScaling(TimestepTable):
    """One scale per timestep group. Maps to ``scaling_impl``.

    ``scale[g] = restrict(value[g]) / int_threshold``, as Brevitas' ``ParameterFromRuntimeStatsScaling``.

    Args:
        timestep_context: context of the denoiser.
        timestep_groups: name of the groups in it.
        collect_stats_steps: calls in training mode that collect a group's statistic.
        scaling_stats_impl: statistic of a batch (absolute maximum, percentile, MSE search, ...).
        scaling_stats_input_view_shape_impl: view applied to the batch first.
        restrict_scaling_impl: keeps scales positive, or powers of two.
        scaling_stats_momentum: of the running statistic.
        scaling_min_val: least scale.
        timestep_reduction: ``"mean"`` or ``"max"`` over calls.
        scaling_table_init: ``[G]`` known values of ``scale * int_threshold``.
        dtype: of the parameter.
        device: of the parameter.
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
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(
            timestep_context,
            timestep_groups,
            collect_stats_steps,
            scaling_stats_momentum,
            timestep_reduction,
            1.0,
            scaling_table_init,
            dtype,
            device,
        )
        self.input_view = scaling_stats_input_view_shape_impl
        self.stats = None if scaling_stats_impl is None else _Stats(scaling_stats_impl, SCALAR_SHAPE)
        self.restrict_scaling = _RestrictValue(restrict_scaling_impl)
        self.restrict_threshold = _RestrictValue(restrict_scaling_impl)
        self.restrict_init = restrict_scaling_impl.restrict_init_module()
        self.clamp_scaling = _ClampValue(scaling_min_val)
        self.create_parameter()

    def write(self, table: Tensor) -> Tensor:
        """Scales -> parameter (their logarithm when restricted to powers of two)."""
        return self.restrict_init(table)

    def read(self, value: Tensor) -> Tensor:
        """Parameter -> scales."""
        return self.restrict_scaling(value)

    def statistic(self, x: Tensor) -> Tensor:
        """Statistic of one batch, clamped to the least scale."""
        if self.stats is None:
            raise CalibrationError(
                "this timestep quantizer was made from known ranges and has no statistic to calibrate with; "
                "build it with .let(scaling_stats_op=StatsOp.MAX) to calibrate it"
            )
        return self.clamp_scaling(self.stats(self.input_view(x)))

    def scales(self, threshold: Tensor) -> Tensor:
        """``[G]`` scales of all groups."""
        threshold = self.restrict_threshold(self.restrict_init(threshold))
        return self.clamp_scaling(self.entries() / threshold)

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """Scale of the samples of ``x``: 0-d for one timestep, ``[N, 1, ..., 1]`` for one per sample."""
        if threshold is None:
            threshold = torch.ones((), dtype=x.dtype, device=x.device)
        if self.training and self.collecting:
            if self.local_loss_mode:
                return self.statistic(x) / threshold
            return self.select(self.observe(x) / threshold, x)
        return self.select(self.scales(threshold), x)

    def init_scale(self) -> None:
        """What ``calibration_mode`` calls at its end."""
        self.finish()


class TimestepZeroPoint(TimestepTable):
    """One zero point per timestep group. Maps to ``zero_point_impl``.

    As Brevitas' ``ParameterFromRuntimeZeroPoint``, the parameter is the float value of the smallest code, so that the
    integer zero point follows when the scale trains.

    Args:
        timestep_context: context of the denoiser.
        timestep_groups: name of the groups in it.
        int_quant: the quantizer whose integers the zero point is one of.
        quantize_zero_point: whether the zero point is rounded to an integer.
        collect_stats_steps: calls in training mode that collect a group's statistic.
        zero_point_stats_impl: statistic of a batch.
        zero_point_stats_input_view_shape_impl: view applied to the batch first.
        zero_point_stats_momentum: of the running statistic.
        timestep_reduction: ``"mean"`` or ``"max"`` over calls.
        zero_point_table_init: ``[G]`` known values of ``scale * zero_point``.
        dtype: of the parameter.
        device: of the parameter.
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
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(
            timestep_context,
            timestep_groups,
            collect_stats_steps,
            zero_point_stats_momentum,
            timestep_reduction,
            0.0,
            zero_point_table_init,
            dtype,
            device,
        )
        self.input_view = zero_point_stats_input_view_shape_impl
        self.stats = zero_point_stats_impl
        self.scale_shift_zero_point = _ScaleShiftZeroPoint(int_quant, quantize_zero_point)
        self.create_parameter()

    def statistic(self, x: Tensor) -> Tensor:
        """Statistic of one batch."""
        if self.stats is None:
            raise CalibrationError(
                "this timestep quantizer was made from known ranges and has no statistic to calibrate its zero point "
                "with; start from ShiftedUint8ActPerTimestepFloat to calibrate it"
            )
        return self.stats(self.input_view(x))

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

    def init_zp(self) -> None:
        """What ``calibration_mode`` calls at its end."""
        self.finish()
