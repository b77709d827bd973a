"""A plan as a Brevitas layer map: every layer gets the widths, ranges and rounding that the plan says.

A symmetric quantizer becomes a signed one, an asymmetric one Brevitas' "shifted unsigned": codes and zero point move up
by ``2^(bits-1)``, which integers do exactly. Scales are parameters, stored as ``scale * 2^k`` because Brevitas divides
by an integer threshold, and a power of two is the threshold that divides exactly. Arithmetic is `ReciprocalIntQuant`.
Together: the Brevitas model equals the plan's own simulation bit for bit, and every scale can be trained from there.
"""

from __future__ import annotations

from typing import Any

from dq_brevitas import host  # noqa: F401  isort: skip
import torch
from brevitas.core.scaling import ParameterScaling, PowerOfTwoIntScaling
from brevitas.core.zero_point import ParameterZeroPoint, ZeroZeroPoint
from brevitas.inject import ExtendedInjector
from brevitas.inject.enum import (
    BitWidthImplType,
    FloatToIntImplType,
    QuantType,
    RestrictValueType,
    ScalingPerOutputType,
    StatsOp,
)
from brevitas.quant.solver import ActQuantSolver, WeightQuantSolver
from torch import Tensor, nn

from dq_brevitas.balanced import BalancedActIntQuant, BalancedWeightIntQuant, BalancedWeightProxy
from dq_brevitas.corrected import PlanCorrection
from dq_brevitas.dynamic import Int8DynamicActPerTokenFloat
from dq_brevitas.integer import ReciprocalIntQuant
from dq_brevitas.plain import QUANT_CLASSES
from dq_brevitas.quantizers import TimestepActMixin
from dq_brevitas.scaling import TimestepZeroPoint
from dq_plugins.affine import integer_range
from dq_plugins.errors import PlanError
from dq_plugins.layer_kinds import kind_of
from dq_plugins.plan import ActivationQuant, DynamicActivationQuant, LayerPlan, QuantPlan, WeightQuant
from dq_plugins.quantized.layer_transform import fake_weight, per_input, transform_of
from dq_plugins.timesteps import RowOrder, TimestepContext


class _PlanQuant(ExtendedInjector):
    """What weight and activation quantizers made from a plan have in common."""

    quant_type = QuantType.INT
    bit_width_impl_type = BitWidthImplType.CONST
    float_to_int_impl_type = FloatToIntImplType.ROUND
    restrict_scaling_type = RestrictValueType.FP
    narrow_range = False
    signed = True
    int_quant = ReciprocalIntQuant
    int_scaling_impl = PowerOfTwoIntScaling
    scaling_impl_type = "parameter"
    quantize_zero_point = True
    zero_point_impl = ZeroZeroPoint


class PlanWeight(_PlanQuant, WeightQuantSolver):
    """Weight quantizer of a plan, symmetric; scale per output channel or per tensor, a parameter."""

    scaling_impl = ParameterScaling
    scaling_per_output_type = ScalingPerOutputType.CHANNEL
    dtype = torch.float32  # Brevitas would round the scales of a bfloat16 layer to bfloat16


class PlanAct(TimestepActMixin, _PlanQuant, ActQuantSolver):
    """Activation quantizer of a plan, symmetric; one scale per timestep group, a parameter."""

    int_quant = ReciprocalIntQuant
    scaling_per_output_type = ScalingPerOutputType.TENSOR
    scaling_stats_op = StatsOp.MAX  # should somebody restart its calibration


class PlanBinaryWeight(PlanWeight):
    """Binary weight quantizer of a plan: the sign of the weight times a scale, a parameter."""

    quant_type = QuantType.BINARY
    narrow_range = True
    bit_width = 1


def _shifted(zero_point: Tensor, bits: int, where: str) -> Tensor:
    q_min, q_max = integer_range(bits)
    if int(zero_point.min()) < q_min or int(zero_point.max()) > q_max:
        raise PlanError(
            f"{where} has zero points {int(zero_point.min())} .. {int(zero_point.max())}; Brevitas holds those within "
            f"the integer range {q_min} .. {q_max} of {bits} bits only. Let the range contain zero."
        )
    return zero_point.float() - q_min


def _threshold(bits: int, *, signed: bool) -> float:
    return 2.0 ** (bits - 1 if signed else bits)


def weight_quantizer(
    quant: WeightQuant, layer: nn.Module, name: str = "the layer", balance: Tensor | None = None
) -> type[ExtendedInjector]:
    """Brevitas weight quantizer of one layer.

    Args:
        quant: what the plan says.
        layer: the layer, for the shape of its scale.
        name: of the layer, for messages.
        balance: what the channels of its input are divided by, ``[C]``.

    Returns:
        An injector for ``weight_quant``.

    Raises:
        PlanError: a zero point is outside the integer range, the layer's output channel is not dimension 0, or a
            binary weight is balanced.
    """
    weight = layer.weight
    kind = kind_of(layer)
    if kind is not None and not kind.scale_per_row and quant.scale.numel() > 1:
        raise PlanError(
            f"{name!r} is a transposed convolution, whose output channel is dimension 1 of the weight; a plan's scale "
            "per channel is for dimension 0. Use one scale per tensor for it."
        )
    if quant.scale.numel() not in (1, weight.shape[0]):
        raise PlanError(f"{name!r} has {weight.shape[0]} output channels and the plan {quant.scale.numel()} scales")
    # no shape for a scalar: Brevitas would read the number to fill the shape, and layers are built on the meta device
    shape = (quant.scale.numel(), *[1] * (weight.dim() - 1)) if quant.scale.numel() > 1 else None
    scale = quant.scale.float().reshape(shape or ())
    if quant.scheme == "binary" and balance is not None:
        raise PlanError(
            f"{name!r} has a binary weight and balanced input channels; Brevitas' binary quantizer has none"
        )
    if quant.scheme == "binary":
        return PlanBinaryWeight.let(scaling_init=scale, scaling_shape=shape)
    injector = PlanWeight.let(
        bit_width=quant.bits,
        scaling_init=scale * _threshold(quant.bits, signed=quant.symmetric),
        scaling_shape=shape,
        signed=quant.symmetric,
    )
    if balance is not None:
        factors = per_input(layer, balance)
        injector = injector.let(int_quant=BalancedWeightIntQuant, proxy_class=BalancedWeightProxy, balance=factors)
    if quant.zero_point is None:
        return injector
    zero_point = _shifted(quant.zero_point, quant.bits, f"the weight of {name!r}").reshape(shape or ())
    return injector.let(zero_point_impl=ParameterZeroPoint, zero_point_init=zero_point * scale, zero_point_shape=shape)


def activation_quantizer(
    quant: ActivationQuant,
    name: str = "the layer",
    context: TimestepContext | None = None,
    balance: Tensor | None = None,
    rows: RowOrder | None = None,
) -> type[ExtendedInjector]:
    """Brevitas activation quantizer of one layer, with the plan's table.

    Args:
        quant: what the plan says.
        name: of the layer, for messages.
        context: the timestep context; None waits for `attach_timesteps`.
        balance: what the channels of the input are divided by, as it broadcasts against the input.
        rows: where the samples of a call are in the input.

    Returns:
        An injector for ``input_quant``.

    Raises:
        PlanError: a zero point is outside the integer range.
    """
    symmetric = quant.symmetric
    scale = quant.scale.float()
    injector = PlanAct.let(
        bit_width=quant.bits,
        timestep_context=context,
        timestep_groups=quant.groups,
        timestep_rows=rows,
        scaling_table_init=scale * _threshold(quant.bits, signed=symmetric),
        signed=symmetric,
    )
    if balance is not None:
        injector = injector.let(int_quant=BalancedActIntQuant, balance=balance)
    if symmetric:
        return injector
    zero_point = _shifted(quant.zero_point, quant.bits, f"the input of {name!r}")
    return injector.let(zero_point_impl=TimestepZeroPoint, zero_point_table_init=zero_point * scale)


def layer_map(plan: QuantPlan, context: TimestepContext | None = None) -> dict[type[nn.Module], tuple[Any, Any]]:
    """The plan as ``compute_layer_map`` of Brevitas' ``layerwise_quantize``.

    Layers that the plan does not quantize come out without quantizers. Where rounding was learned, the layer's weight
    becomes the value of the plan's codes, which re-quantizes to exactly these codes and trains on from there.

    Call `attach_timesteps(model, plan.groups)` afterwards, unless a context is given and attached by yourself;
    `BrevitasAdapter` does all of it and checks more.

    Args:
        plan: the plan.
        context: the timestep context, if there is one already.

    Example:
        >>> model = layerwise_quantize(model, compute_layer_map=layer_map(plan))  # doctest: +SKIP
        >>> attach_timesteps(model, plan.groups, timestep=plan.timestep_argument)  # doctest: +SKIP
    """
    plan.validate()
    # Brevitas evaluates literal lambdas of (module, name) only, not functions or partial objects.
    arguments = {
        "weight_quant": lambda module, name: _weight_for(plan, module, name),
        "input_quant": lambda module, name: _input_for(plan, module, name, context),
        "bias_quant": None,
        "output_quant": lambda module, name: _correction_for(plan, name, context),
        "return_quant_tensor": False,
    }
    return {plain: (quantized, arguments) for plain, quantized in QUANT_CLASSES.items()}


def _weight_for(plan: QuantPlan, layer: nn.Module, name: str) -> type[ExtendedInjector] | None:
    planned = plan.layers.get(name, LayerPlan(""))
    quant = planned.weight
    if quant is None:
        return None
    if quant.codes is not None:
        if quant.codes.shape != layer.weight.shape:
            raise PlanError(
                f"the plan's codes of {name!r} have shape {tuple(quant.codes.shape)}, its weight "
                f"{tuple(layer.weight.shape)}"
            )
        with torch.no_grad():
            fake = fake_weight(layer, quant, transform_of(planned))
            layer.weight = nn.Parameter(fake, layer.weight.requires_grad)
    return weight_quantizer(quant, layer, name, planned.balance)


def _input_for(
    plan: QuantPlan, layer: nn.Module, name: str, context: TimestepContext | None
) -> type[ExtendedInjector] | None:
    planned, kind = plan.layers.get(name, LayerPlan("")), kind_of(layer)
    if planned.activation is None:
        return None
    balance = None if planned.balance is None or kind is None else kind.per_output(planned.balance)
    if isinstance(planned.activation, DynamicActivationQuant):
        quant = planned.activation
        form = {"bit_width": quant.bits, "symmetric": quant.symmetric, "clip": quant.clip}
        return Int8DynamicActPerTokenFloat.let(**form, balance=balance)
    return activation_quantizer(planned.activation, name, context, balance, planned.rows)


def _correction_for(plan: QuantPlan, name: str, context: TimestepContext | None) -> type[ExtendedInjector] | None:
    correction = plan.layers.get(name, LayerPlan("")).bias_correction
    if correction is None:
        return None
    rows = plan.layers[name].rows
    return PlanCorrection.let(bias_correction=correction, timestep_context=context, timestep_rows=rows)
