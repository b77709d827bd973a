"""What integer layers share: the table of activation parameters, the routing.

One formula holds for every kernel, with ``q`` the activation codes and ``w`` the weight codes, less their zero point
and times the scale of their group of inputs:

    y[o] = s[g] * s_w[o] * (sum_k q[k] w[o, k]  -  z[g] * sum_k w[o, k])  +  b[o] + correction[g, o]

``g`` is the timestep group that the context selects by the value of t. The sum over the weight codes does not
depend on the input, so it is computed once. The correction of the group is added to the bias, not to the output. Where
channels of the input are divided by a balance, the codes are those of ``x`` times ``1 / (s[g] balance)``: one
multiplication of the input, as without it. A rotation of the input is a small product in float32 before it, and so is
taking out directions that stay in floating point.

Rows of the input may have parameters of their own (`dq_torchao.row_ranges`). A timestep group may have a narrower code,
which the same kernel multiplies, or none: its inputs stay in floating point and meet the dequantized weight.

Shapes: ``O`` outputs, ``K`` products per output, ``C`` input channels, ``G`` groups, ``N`` batch.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from dq_plugins.affine import code_ranges, integer_range
from dq_plugins.errors import DQError, TimestepError
from dq_plugins.plan import ActivationQuant, BiasCorrection, DynamicActivationQuant, InputQuant, LayerPlan
from dq_plugins.plan.low_rank import scaled_down
from dq_plugins.quantized.code_widths import input_widths
from dq_plugins.quantized.layer_transform import transform_of
from dq_plugins.quantized.output_correction import rows_for_output
from dq_plugins.timesteps import TimestepContext, select_for_input
from dq_torchao.columns import selected_column
from dq_torchao.kernels import activation_codes, code_offset, kernel_dtype
from dq_torchao.report import Execution
from dq_torchao.row_ranges import RowRanges, in_dtype, result_dtype
from dq_torchao.shared_codes import ParameterKey, shared_codes

NO_GRADIENT = (
    "an integer layer passes no gradient to its input, so what comes before it would be trained wrongly. Sample under "
    "torch.no_grad(), as pipelines do; train adapters on the full-precision denoiser, or on quantized weights alone "
    "(act_bits=None)."
)


def refuse_frozen_group(device: torch.device, context: TimestepContext) -> None:
    """Raise `TimestepError` where a compiler would take the group of the running call for that of all calls."""
    frozen = torch.compiler.is_compiling() and inductor_config.freezing and not torch.is_grad_enabled()
    if frozen and device.type == "cpu" and not context.selection.traced:
        raise TimestepError(
            "a part of this denoiser is compiled on its own with inductor's freezing, which would freeze the timestep "
            "group of one call into it. Compile the denoiser as a whole, or compile parts of it without "
            "torch._inductor.config.freezing, which integer layers do not need"
        )


class IntegerLayer(RowRanges):
    """A layer with integer weights whose activation parameters come from a timestep-group table, or from each token.

    It is made in place of the floating-point layer (`from_float`). The weight is held packed; kernels keep a form of
    their own (`dq_torchao.kernels.packing`), which is not part of the layer.

    Attributes:
        act_scale: float32 ``[G]``; None with dynamic ranges.
        act_zero_point: int32 ``[G]``, signed; None likewise.
        act_bits: width of the activation codes; the largest, where groups differ.
        group_bits: width in each group where they differ, None among them for floating point.
        dynamic: the dynamic ranges; None where they come from the table.
        act_forms: float32 ``[G, 2]``: largest code and clip of dynamic ranges in each group, where groups differ.
        group_name: name of the timestep groups that index the table.
        correction_groups: name of the timestep groups that index the corrections, mostly the same.
        context: what selects the group.
        execution: how this layer runs.
        parameter_key: what tells layers apart that quantize one input differently.
        split_key: what tells layers apart that keep different directions of one input in floating point.
    """

    operator: ClassVar[str]
    """Name of the operator that multiplies: ``"linear"`` or ``"conv2d"``."""

    exact_state = (*RowRanges.exact_state, "act_scale")

    act_scale: Tensor | None
    act_zero_point: Tensor | None
    act_low: Tensor | None
    act_high: Tensor | None
    act_floating: Tensor | None
    act_bits: int
    group_bits: tuple[int | None, ...] | None
    dynamic: DynamicActivationQuant | None
    act_forms: Tensor | None
    group_name: str
    correction_groups: str
    context: TimestepContext
    execution: Execution
    parameter_key: ParameterKey
    split_key: ParameterKey

    @classmethod
    def from_float(cls, layer: nn.Module, plan: LayerPlan, context: TimestepContext) -> IntegerLayer:
        """Turn ``layer`` into an integer layer, in place.

        Args:
            layer: the floating-point layer.
            plan: its decisions; both quantizers present, at most 8 bits each, weight codes less zero point fit int8.
            context: the context attached to the denoiser.

        Returns:
            The same object, of this class.
        """
        assert plan.weight is not None
        assert plan.activation is not None
        integer = cls.in_place_of(layer, plan.weight, transform_of(plan))
        integer.store_tables(plan.activation, plan.bias_correction)
        integer.context, integer.rows = context, plan.rows
        return integer

    def store_tables(self, quant: InputQuant, correction: BiasCorrection | None = None) -> None:
        """Hold the activation parameters, unless they are dynamic, and the corrections of every timestep group."""
        table, self.act_bits = quant if isinstance(quant, ActivationQuant) else None, quant.bits
        self.dynamic = quant if isinstance(quant, DynamicActivationQuant) else None
        self.group_name = quant.groups or ""
        self.parameter_key, self.split_key = ParameterKey(), ParameterKey()
        self.state_widths([self.weight_bits, self.weight_signs, *input_widths(quant)], self.weight_packed.device)
        self._hold("act_scale", table and table.scale)
        self._hold("act_zero_point", table and table.zero_point)
        self.group_bits = table and table.group_bits
        varying = self.dynamic is not None and self.dynamic.groups is not None
        forms = [[integer_range(f.bits)[1], f.clip] for f in self.dynamic.forms] if varying and self.dynamic else None
        self._hold("act_forms", forms and torch.tensor(forms), persistent=False)  # the plan says it
        ranges = (None, None, None) if self.group_bits is None else code_ranges(self.group_bits)
        for name, each in zip(("act_low", "act_high", "act_floating"), ranges, strict=True):
            self._hold(name, each, persistent=False)  # the plan says it
        self._hold("bias_correction", correction and correction.values)
        self.correction_groups = (correction and correction.groups) or self.group_name

    def _hold(self, name: str, table: Tensor | None, *, persistent: bool = True) -> None:
        held = None if table is None else table.to(self.weight_packed.device, copy=True)
        # tools that offload take every name that is not persistent for a tensor
        self.register_buffer(name, held, persistent=persistent or held is None)

    def forward(self, input: Tensor) -> Tensor:
        """Quantize ``input`` with the parameters of its timestep, multiply in integers, rescale."""
        if input.requires_grad and torch.is_grad_enabled():
            raise DQError(NO_GRADIENT)
        if self.group_bits is not None and None in self.group_bits:
            return self._partly_floating(input)
        return self._integers(input)

    def _integers(self, x: Tensor) -> Tensor:
        """Products in integers, and beside them what stays in floating point."""
        if self.input_split is None or self.kept_weight is None:
            return self._with_branch(self._quantized(x), x)
        key = None if torch.compiler.is_compiling() else self.split_key.of(self.input_split.basis)
        parts = partial(self.input_split, x, self._kind.channel_axis)
        inside, rest = shared_codes(self.context.running.selection, x, key, parts, slot="last split")
        y = self.with_kept(self._quantized(rest), inside, self.kept_weight.to(inside.dtype))
        return self._with_branch(in_dtype(y, result_dtype(x)), x)

    def _quantized(self, x: Tensor) -> Tensor:
        row = self._row()
        one_width = self.act_scale is not None and self.group_bits is None
        column = selected_column(self, self.context) if one_width else None
        if column is not None:
            codes = self._codes(self.padded(x), column.factor, column.zero_point)
            y = self.multiply(codes, column.scale, column.zero_point, self._bias(row), kernel_dtype(x))
            return in_dtype(y, result_dtype(x))
        if self.act_scale is None or self.act_zero_point is None:
            assert self.dynamic is not None
            index = None if self.act_forms is None else self._index(self.group_name, self.act_forms)
            return self._dynamic(x, self.dynamic, row, index)
        return self._by_groups(x, self._index(self.group_name, self.act_scale), row)

    def _row(self) -> Tensor | None:
        """The rows of the corrections that a call selects."""
        return None if self.bias_correction is None else self._index(self.correction_groups, self.bias_correction)

    def _with_branch(self, y: Tensor, x: Tensor) -> Tensor:
        """``y`` and the low-rank branch: two thin products of the input as it comes, in its dtype."""
        if self.low_rank_down is None or self.low_rank_up is None:
            return y
        down = scaled_down(self.low_rank_down, self.low_rank_scale, x.dtype, x.device)
        return y + self.multiply_floats(x, down, self.low_rank_up.to(x.dtype))

    def multiply_floats(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """What this layer makes of ``x`` with the weight ``up @ down``, without a bias."""
        raise NotImplementedError

    def with_kept(self, y: Tensor, inside: Tensor, weight: Tensor) -> Tensor:
        """``y`` and what a layer of this kind makes of ``inside [..., r, ...]`` with ``[O, r, *kernel]``."""
        raise NotImplementedError

    def _by_groups(self, x: Tensor, index: Tensor, row: Tensor | None) -> Tensor:
        """Every sample by the range of its timestep group."""
        assert self.act_scale is not None
        assert self.act_zero_point is not None
        if index.numel() > 1 or (row is not None and row.numel() > 1):
            where = index, x, self._kind.spatial, self.rows
            scale, zero_point = (select_for_input(t, *where) for t in (self.act_scale, self.act_zero_point))
            stored = zero_point + code_offset(x.device)
            codes = self._codes(self.padded(x, wholly=True), scale.reciprocal(), stored)
            codes = self._narrowed(codes, index, x)
            return self._by_rows(codes, scale, zero_point, row).to(result_dtype(x))
        # [1] tensors all the way: this runs at every layer of every step, and each small operation costs microseconds.
        scale = self.act_scale.index_select(0, index)
        zero_point = self.act_zero_point.index_select(0, index) + code_offset(x.device)
        codes = self._narrowed(self._codes_once(x, scale.reciprocal(), zero_point), index, x)
        return self.multiply(codes, scale, zero_point, self._bias(row), kernel_dtype(x)).to(result_dtype(x))

    def _narrowed(self, codes: Tensor, index: Tensor, x: Tensor) -> Tensor:
        """Codes of the widest group, cut to those that the group of each sample has."""
        if self.act_low is None or self.act_high is None:
            return codes
        ends = (select_for_input(end, index, x, self._kind.spatial, self.rows) for end in (self.act_low, self.act_high))
        low, high = ((end + code_offset(x.device)).to(codes.dtype) for end in ends)
        return torch.minimum(torch.maximum(codes, low), high)

    def _partly_floating(self, x: Tensor) -> Tensor:
        """Samples of some groups in floating point. Eager code looks which; a graph computes both and chooses."""
        assert self.act_floating is not None
        assert self.act_scale is not None
        index, row = self._index(self.group_name, self.act_scale), self._row()
        floating = select_for_input(self.act_floating, index, x, self._kind.spatial, self.rows)
        if floating.numel() > 1 or torch.compiler.is_compiling():
            return torch.where(floating, self._floating(x, row), self._integers(x))
        return self._floating(x, row) if bool(floating) else self._integers(x)

    def _floating(self, x: Tensor, row: Tensor | None) -> Tensor:
        """The product of the input as it is with the dequantized weight."""
        y = self._kind.module.forward(self, x)
        if row is None or self.bias_correction is None:
            return y
        if row.numel() > 1:
            return (y + rows_for_output(self._kind, self.bias_correction, row, y, self.rows)).to(y.dtype)
        correction = self.bias_correction.index_select(0, row).reshape(-1)
        return (y + self._kind.per_output(correction)).to(y.dtype)

    def _index(self, groups: str, table: Tensor) -> Tensor:
        """Rows of ``table`` that the call selects; a single one, whatever the timesteps, where it has no more."""
        refuse_frozen_group(table.device, self.context)
        index = self.context.index(groups).to(table.device)
        return index if len(table) > 1 or index.numel() == 1 else index.reshape(-1)[:1]

    def _codes(self, x: Tensor, factor: Tensor, zero_point: Tensor) -> Tensor:
        """Codes of the transformed input by one over the scale; without a rotation, the balance is part of that."""
        if self.input_rotation is not None:
            x = self._transformed(x)
        elif self.inverse_balance is not None:
            factor = factor * self.inverse_balance
        return activation_codes(x, factor, zero_point, self.act_bits)

    def _codes_once(self, x: Tensor, factor: Tensor, zero_point: Tensor) -> Tensor:
        """`_codes` of the padded input, or those that the layer before has made of the same."""
        if torch.compiler.is_compiling():
            return self._codes(self.padded(x), factor, zero_point)
        padded, key = self.padded(x), None
        if padded is x and self.input_rotation is None:
            values = self.parameter_key.of(self.act_scale, self.act_zero_point, self.inverse_balance)
            key = values and (self.group_name, self.act_bits, values)
        return shared_codes(self.context.selection, x, key, lambda: self._codes(padded, factor, zero_point))

    def extra_repr(self) -> str:
        """Shape, widths and groups."""
        shape = "x".join(str(n) for n in self.weight_shape)
        width = f"W{self.weight_bits}A{self.group_bits or self.act_bits}"
        parts = ("inverse_balance", "input_rotation", "low_rank_down", "input_split", "bias_correction")
        beside = [name for name in parts if getattr(self, name) is not None]
        table = self.act_scale
        ranges = "dynamic" if table is None else f"groups={self.group_name!r} ({len(table)})"
        return ", ".join([shape, width, ranges, *beside, self.execution.state])
