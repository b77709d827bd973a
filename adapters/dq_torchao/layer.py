"""What integer Linear and Conv2d layers share: packed weight codes, the table of activation parameters, the routing.

One formula holds for every kernel, with ``q`` the activation codes and ``w`` the weight codes (less their zero point):

    y[o] = s[g] * s_w[o] * (sum_k q[k] w[o, k]  -  z[g] * sum_k w[o, k])  +  b[o] + correction[g, o]

``g`` is the timestep group that the context selects by the value of t. The sum over the weight codes does not
depend on the input, so it is computed once. The correction of the group is added to the bias, not to the output. Where
channels of the input are divided by a balance, the codes are those of ``x`` times ``1 / (s[g] balance)``: one
multiplication of the input, as without it.

Shapes: ``O`` outputs, ``K`` products per output, ``C`` input channels, ``G`` groups, ``N`` batch.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from dq_plugins.affine import per_row
from dq_plugins.errors import DQError, TimestepError
from dq_plugins.plan import ActivationQuant, BiasCorrection, LayerPlan
from dq_plugins.quantized.output_correction import rows_for_output
from dq_plugins.timesteps import TimestepContext, select_for_input
from dq_torchao.kernels import (
    StoredWeight,
    activation_codes,
    code_offset,
    is_frozen,
    kernel_dtype,
    plain_codes,
    release,
    weight_code_sum,
)
from dq_torchao.packed_weight import PackedWeight
from dq_torchao.report import Execution

NO_GRADIENT = (
    "an integer layer passes no gradient to its input, so what comes before it would be trained wrongly. Sample under "
    "torch.no_grad(), as pipelines do; train adapters on the full-precision denoiser, or on quantized weights alone "
    "(act_bits=None)."
)


def refuse_frozen_group(device: torch.device, context: TimestepContext) -> None:
    """Raise `TimestepError` where a compiler would take the group of the running call for that of all calls."""
    if is_frozen(device) and not context.selection.traced:
        raise TimestepError(
            "a part of this denoiser is compiled on its own with inductor's freezing, which would freeze the timestep "
            "group of one call into it. Compile the denoiser as a whole, or compile parts of it without "
            "torch._inductor.config.freezing"
        )


class IntegerLayer(PackedWeight):
    """A layer with integer weights whose activation parameters come from a timestep-group table.

    It is made in place of the floating-point layer (`from_float`). The weight is held packed; kernels keep a form of
    their own (`dq_torchao.kernels.packing`), which is not part of the layer.

    Attributes:
        act_scale: float32 ``[G]``.
        act_zero_point: int32 ``[G]``, signed.
        act_bits: width of the activation codes.
        group_name: name of the timestep groups that index the table.
        bias_correction: float32 ``[G, O]``; None without one, and where it has one row, which is part of the bias.
        correction_groups: name of the timestep groups that index it, mostly the same.
        context: what selects the group.
        execution: how this layer runs.
    """

    operator: ClassVar[str]
    """Name of its kind, which is that of the operator too."""

    exact_state = (*PackedWeight.exact_state, "act_scale", "bias_correction")

    act_scale: Tensor
    act_zero_point: Tensor
    bias: Tensor | None
    act_bits: int
    group_name: str
    bias_correction: Tensor | None
    correction_groups: str
    context: TimestepContext
    execution: Execution

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
        integer = cls.in_place_of(layer, plan.weight, plan.balance)
        integer.store_tables(plan.activation, plan.bias_correction)
        integer.context = context
        return integer

    def store_tables(self, quant: ActivationQuant, correction: BiasCorrection | None = None) -> None:
        """Hold the activation parameters and the corrections of every timestep group."""
        device = self.weight_packed.device
        self.group_name, self.act_bits = quant.groups, quant.bits
        self.register_buffer("act_scale", quant.scale.to(device, copy=True))
        self.register_buffer("act_zero_point", quant.zero_point.to(device, copy=True))
        self.register_buffer("bias_correction", None if correction is None else correction.values.to(device, copy=True))
        self.correction_groups = quant.groups if correction is None or correction.groups is None else correction.groups

    @property
    def stored_weight(self) -> StoredWeight:
        """The weight as the operators take it."""
        return self.weight_packed, self.weight_shape, self.weight_bits, self.weight_signs, self.weight_zero_point

    @property
    def released(self) -> bool:
        """Whether the packed weight is held by the kernel alone; see `dq_torchao.release_weights`."""
        return self.weight_packed.numel() == 0 and prod(self.weight_shape) > 0

    def release_weight(self) -> int:
        """Let go of the packed weight, if the kernel holds it too; returns the bytes that this freed."""
        stand_in = None if self.released else release(self.weight_packed)
        freed = self.weight_packed.nbytes if stand_in is not None else 0
        if stand_in is not None:
            self.weight_packed = stand_in
        return freed

    def restore_weight(self) -> None:
        """Hold the packed weight again."""
        self.weight_packed = self.packed_weight()

    def packed_weight(self) -> Tensor:
        """See `PackedWeight.packed_weight`."""
        if not self.released:
            return self.weight_packed
        codes = plain_codes(*self.stored_weight)
        if self.weight_zero_point is not None:
            codes = codes + per_row(self.weight_zero_point, codes)
        return self._pack(codes)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight_packed"] = self.packed_weight()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore_weight()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.restore_weight()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which the kernel's layout cannot follow."""
        return self.__dict__ | {"_buffers": self._buffers | {"weight_packed": self.packed_weight()}}

    def forward(self, input: Tensor) -> Tensor:
        """Quantize ``input`` with the parameters of its timestep, multiply in integers, rescale."""
        x = input
        if x.requires_grad and torch.is_grad_enabled():
            raise DQError(NO_GRADIENT)
        index = self._index(self.group_name, self.act_scale)
        row = None if self.bias_correction is None else self._index(self.correction_groups, self.bias_correction)
        refuse_frozen_group(x.device, self.context)
        if index.numel() > 1 or (row is not None and row.numel() > 1):
            return self._per_sample(x, index, row)
        # [1] tensors all the way: this runs at every layer of every step, and each small operation costs microseconds.
        scale = self.act_scale.index_select(0, index)
        zero_point = self.act_zero_point.index_select(0, index) + code_offset(x.device)
        codes = activation_codes(self.padded(x), self._factor(scale), zero_point, self.act_bits)
        return self.multiply(codes, scale, zero_point, self._bias(row), kernel_dtype(x)).to(x.dtype)

    def _index(self, groups: str, table: Tensor) -> Tensor:
        """Rows of ``table`` that the call selects; a single one, whatever the timesteps, where it has no more."""
        index = self.context.index(groups).to(table.device)
        return index if len(table) > 1 or index.numel() == 1 else index.reshape(-1)[:1]

    def _factor(self, scale: Tensor) -> Tensor:
        """What the input is multiplied by to get its codes."""
        factor = scale.reciprocal()
        return factor if self.inverse_balance is None else factor * self.inverse_balance

    def _bias(self, row: Tensor | None) -> Tensor | None:
        """``[O]``: the layer's own and the correction in one row."""
        bias = self.bias
        if self.bias_correction is not None and row is not None:
            correction = self.bias_correction.index_select(0, row).reshape(-1)
            bias = correction if bias is None else correction + bias
        return None if bias is None else bias.to(kernel_dtype(bias))

    def _per_sample(self, x: Tensor, index: Tensor, row: Tensor | None) -> Tensor:
        """The kernels take one scale: multiply the bare codes, then apply each sample's own parameters."""
        scale, zero_point = (select_for_input(t, index, x) for t in (self.act_scale, self.act_zero_point))
        offset = code_offset(x.device)
        codes = activation_codes(self.padded(x, wholly=True), self._factor(scale), zero_point + offset, self.act_bits)
        one, bare_zero = scale.new_ones(1), zero_point.new_full((1,), offset)
        y = self.multiply(codes, one, bare_zero, None, torch.float32, wholly=True)
        weight_sum = self.weight_scale * weight_code_sum(*self.stored_weight)
        y = scale * (y - zero_point * self._kind.per_output(weight_sum))
        if self.bias is not None:
            y = y + self._kind.per_output(self.bias)
        if self.bias_correction is not None and row is not None:
            y = y + rows_for_output(self._kind, self.bias_correction, row, y)
        return y.to(x.dtype)

    def padded(self, x: Tensor, wholly: bool = False) -> Tensor:
        """``x`` with the border that the kernel does not add by itself; ``wholly``: with all of it."""
        return x

    def multiply(
        self,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        wholly: bool = False,
    ) -> Tensor:
        """``s * s_w * sum (q - z) w + b`` by the integer kernel; ``wholly``: the codes are padded already."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Shape, widths and groups."""
        shape = "x".join(str(n) for n in self.weight_shape)
        width = f"W{self.weight_bits}A{self.act_bits}"
        beside = [name for name in ("inverse_balance", "bias_correction") if getattr(self, name) is not None]
        groups = f"groups={self.group_name!r} ({len(self.act_scale)})"
        return ", ".join([shape, width, groups, *beside, self.execution.state])
