"""Layers of a checkpoint: made again as they were saved, without deciding anything."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from dq_plugins.errors import CheckpointError
from dq_plugins.layer_kinds import exact_kind
from dq_plugins.plan import ActivationQuant, BiasCorrection, LayerPlan
from dq_plugins.plan.validity import code_fault, finite_fault, scale_fault
from dq_plugins.quantized.input_quantizers import ActivationQuantizer
from dq_plugins.quantized.layer import simulate_layer
from dq_plugins.quantized.layer_transform import transform_of
from dq_plugins.quantized.output_correction import OutputCorrection
from dq_plugins.quantized.rotate import Rotate
from dq_plugins.quantized.split import Split
from dq_plugins.timesteps import TimestepContext
from dq_torchao.attention import simulate_without_kernel
from dq_torchao.kernels import kernel_for
from dq_torchao.layer import IntegerLayer
from dq_torchao.lowering import INTEGER_LAYERS, folded, integer_class
from dq_torchao.packed_weight import PACKED_LAYERS, PackedWeight, pack_layer, packed_class
from dq_torchao.report import Execution
from dq_torchao.wrapped_forward import exchange


def restore_layer(layer: nn.Module, plan: LayerPlan, context: TimestepContext, execution: Execution, form: str) -> None:
    """Give ``layer`` the form it had when it was saved, in place; its values are loaded afterwards.

    Args:
        layer: the full-precision layer, its weight on the meta device.
        plan: its decisions, with placeholders for tensors.
        context: the context attached to the denoiser.
        execution: how it ran.
        form: name of its class.

    Raises:
        CheckpointError: this release has no such form of this layer.
    """
    own, kind = type(layer), exact_kind(layer)
    counterparts = ((INTEGER_LAYERS, integer_class), (PACKED_LAYERS, packed_class))
    known = [make(own) for table, make in counterparts if kind is not None and kind.module in table]
    forms = {own.__name__: None, **{each.__name__: each for each in known}}
    if form not in forms:
        raise CheckpointError(
            f"the checkpoint has a {own.__name__} in the form {form!r}, and this dq-plugins knows {', '.join(forms)}: "
            "its config is damaged, or of a newer dq-plugins"
        )
    layer.execution = execution  # type: ignore[assignment]
    if execution.state == "full precision":
        return
    plan, chosen = folded(layer, plan), forms[form]
    if chosen is not None:
        _require(plan.weight is not None and plan.weight.bits <= 8, form, plan)
        assert plan.weight is not None
        _without_memory(layer)
        if issubclass(chosen, IntegerLayer):
            _require(plan.activation is not None, form, plan)
            chosen.from_float(layer, plan, context)
            return
        pack_layer(layer, plan.weight, transform_of(plan))
        plan = replace(plan, weight=None)
    simulate_layer(layer, plan, context)


def _require(fits: bool, form: str, plan: LayerPlan) -> None:
    if not fits:
        raise CheckpointError(
            f"the checkpoint has a layer in the form {form!r} that is planned as {plan.width}: damaged"
        )


def _without_memory(layer: nn.Module) -> None:
    """Packing looks at values, which the meta device does not have: one zero, seen as the whole weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    zero = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
    layer.weight = nn.Parameter(zero, requires_grad=False)


def check_values(model: nn.Module) -> None:
    """Check what was loaded, and simulate integer layers for which this machine has no kernel.

    Raises:
        CheckpointError: scales that are not positive float32, or zero points that no code has.
    """
    for name, layer in list(model.named_modules()):
        simulate_without_kernel(layer)
        if isinstance(layer, PackedWeight):
            _check(name, "weight_scale", _scale_fault(layer.weight_scale))
            _check(name, "inverse_balance", _scale_fault(layer.inverse_balance))
            for part in ("low_rank_down", "low_rank_up", "kept_weight"):
                values: Tensor | None = getattr(layer, part)
                _check(name, part, "" if values is None else finite_fault(values.float()))
            _check(name, "low_rank_scale", _scale_fault(layer.low_rank_scale))
            if layer.weight_group_scale is not None and not int(layer.weight_group_scale.min()):
                _check(name, "weight_group_scale", "must be at least 1, found 0")
        if isinstance(layer, Split):
            _check(name, "basis", finite_fault(layer.basis.float()))
        if isinstance(layer, Rotate):
            _check(name, "matrix", finite_fault(layer.matrix.float()))
        if isinstance(layer, OutputCorrection):
            _check(name, "values", finite_fault(layer.values))
        if isinstance(layer, ActivationQuantizer):
            _check(name, "scale", _scale_fault(layer.scale))
            _check(name, "balance", _scale_fault(layer.balance))
            _check(name, "zero_point", code_fault(layer.zero_point, layer.bits))
        if isinstance(layer, IntegerLayer):
            _check(name, "act_scale", _scale_fault(layer.act_scale))
            if layer.bias_correction is not None:
                _check(name, "bias_correction", finite_fault(layer.bias_correction))
            if layer.act_zero_point is not None:
                _check(name, "act_zero_point", code_fault(layer.act_zero_point, layer.act_bits))
            if reason := kernel_for(layer.operator, layer.weight_packed.device).unsupported_reason:
                _simulate_instead(layer, reason)


def _check(layer: str, part: str, fault: str) -> None:
    if fault:
        raise CheckpointError(f"layer {layer!r}: {part} {fault}: the checkpoint is damaged")


def _scale_fault(scale: Tensor | None) -> str:
    return "" if scale is None else scale_fault(scale, tuple(scale.shape))  # shapes are those of the skeleton


def _simulate_instead(layer: IntegerLayer, reason: str) -> None:
    """The same values in floating point, in place: the checkpoint comes from a machine that has the kernel."""
    activation = layer.dynamic
    if layer.act_scale is not None and layer.act_zero_point is not None:
        parts = (layer.act_scale, layer.act_zero_point, layer.group_bits)
        activation = ActivationQuant(layer.act_bits, layer.group_name, *parts)
    plain = next(each for each in type(layer).__mro__ if each in INTEGER_LAYERS)
    own = getattr(type(layer), "_dq_original", plain)
    balance = None if layer.inverse_balance is None else layer.inverse_balance.reciprocal().flatten()
    table = layer.bias_correction
    correction = None if table is None else BiasCorrection(table, layer.correction_groups)
    del layer.act_scale, layer.act_zero_point, layer.act_low, layer.act_high, layer.act_floating, layer.bias_correction
    former, layer.__class__ = type(layer), packed_class(own)  # type: ignore[assignment]
    exchange(layer, former)
    rotation = None if layer.input_rotation is None else layer.input_rotation.planned
    subspace = None if layer.input_split is None else layer.input_split.planned
    parts = {"balance": balance, "bias_correction": correction, "rotation": rotation, "subspace": subspace}
    plan = LayerPlan("", activation=activation, low_rank=layer.low_rank, rows=layer.rows, **parts)
    simulate_layer(layer, plan, layer.context)
    dtype = str(layer.weight_dtype).removeprefix("torch.")
    layer.execution = Execution("simulated", layer.execution.width, "", dtype, reason).stored_by(layer)
