"""One layer of a plan -> integer execution where the kernels can, floating point where they cannot, and the reason.

Either way the layer holds its weight packed, if it has at most 8 bits and is a linear layer or a convolution.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from dq_plugins.affine import integer_range
from dq_plugins.errors import PlanError
from dq_plugins.layer_kinds import exact_kind, kind_of
from dq_plugins.plan import ActivationQuant, LayerPlan, WeightQuant
from dq_plugins.quantized.layer import simulate_layer
from dq_plugins.quantized.layer_transform import transform_of
from dq_plugins.timesteps import TimestepContext
from dq_torchao.conv import IntegerConv1d, IntegerConv2d, IntegerConv3d
from dq_torchao.conv_transpose import IntegerConvTranspose1d, IntegerConvTranspose2d, IntegerConvTranspose3d
from dq_torchao.kernels import kernel_dtype, kernel_for
from dq_torchao.kernels.product import OWN_KERNEL, takes, takes_conv2d
from dq_torchao.layer import IntegerLayer
from dq_torchao.linear import IntegerLinear
from dq_torchao.packed_weight import can_pack, counterpart, pack_layer
from dq_torchao.report import Execution, Timing
from dq_torchao.wrapped_forward import unreachable

INTEGER_LAYERS: dict[type[nn.Module], type[IntegerLayer]] = {
    nn.Linear: IntegerLinear,
    nn.Conv1d: IntegerConv1d,
    nn.Conv2d: IntegerConv2d,
    nn.Conv3d: IntegerConv3d,
    nn.ConvTranspose1d: IntegerConvTranspose1d,
    nn.ConvTranspose2d: IntegerConvTranspose2d,
    nn.ConvTranspose3d: IntegerConvTranspose3d,
}
"""Integer counterpart of PyTorch's layer classes."""


def integer_class(original: type[nn.Module]) -> type[IntegerLayer]:
    """The class of an integer layer that was of the class ``original`` (one for which `exact_kind` holds)."""
    plain = next(each for each in original.__mro__ if each in INTEGER_LAYERS)
    found = counterpart(original, plain, INTEGER_LAYERS[plain], integer_class)
    assert issubclass(found, IntegerLayer)
    return found


def unsupported_reason(layer: nn.Module, plan: LayerPlan) -> str:
    """Why ``layer`` cannot run in integers; empty when it can."""
    if plan.weight is None or plan.activation is None:
        return plan.why or "the plan quantizes only its weight or only its input"
    if plan.weight.bits > 8 or plan.activation.bits > 8:
        return f"{plan.width} does not fit int8"
    if not _fits_int8(plan.weight):
        grouped = "" if plan.weight.group_scale is None else ", times the scales of groups,"
        return f"{plan.weight.bits}-bit weight codes less the zero points of the plan{grouped} do not fit int8"
    kind = exact_kind(layer)
    if kind is None:
        of_pytorch = kind_of(layer)
        name = type(layer).__name__
        if of_pytorch is None:
            return f"{name} is no layer of PyTorch's: what it does with its weight is its own"
        return f"{name} may compute something else than PyTorch's {of_pytorch.module.__name__}, from which it derives"
    if kind.module not in INTEGER_LAYERS:
        return f"there is no integer kernel for {type(layer).__name__}"
    products = kind.products(_weight(layer).shape, getattr(layer, "groups", 1))
    if products > (most := most_products(plan.weight)):
        return f"an output sums {products} products, and int32 is sure to hold {most} of them"
    if reason := _overflow(plan, products):
        return reason
    kernel = kernel_for(INTEGER_LAYERS[kind.module].operator, _weight(layer).device)
    return kernel.unsupported_reason or unreachable(layer, after_exchange=True)


def _overflow(plan: LayerPlan, products: int) -> str:
    """Why float32 cannot hold a sum of codes times one of its two scales, as kernels compute it; empty when it can."""
    assert plan.weight is not None
    activation = plan.activation.scale if isinstance(plan.activation, ActivationQuant) else plan.weight.scale
    largest = max(float(plan.weight.scale.max()), float(activation.max()))
    if largest < torch.finfo(torch.float32).max / (products * 255 * 128):
        return ""
    return f"a scale of {largest:.3g} times a sum of {products} products of codes overflows float32"


def most_products(quant: WeightQuant) -> int:
    """How many products of an 8-bit activation and a weight code an int32 holds, whatever their values.

    Kernels add up codes of activations from 0 to 255 before they take the zero point off; int32 overflows silently.
    """
    plain = quant.zero_point is None and quant.group_scale is None
    largest = -integer_range(quant.bits)[0] if plain else 128
    return (2**31 - 1) // (255 * largest)


def _fits_int8(quant: WeightQuant) -> bool:
    """Whether codes less their zero points, and times their group scales, which kernels do not know, fit int8."""
    if quant.zero_point is None and quant.group_scale is None:
        return True
    low, high = integer_range(quant.bits)
    zero_point = torch.zeros((1, 1), dtype=torch.int32) if quant.zero_point is None else quant.zero_point
    least, most = low - zero_point, high - zero_point
    if quant.group_scale is not None:
        u = quant.group_scale.int()
        least, most = (bound.reshape(len(bound), -1) * u for bound in (least, most))
    return int(least.min()) >= -128 and int(most.max()) <= 127


def lower_layer(layer: nn.Module, plan: LayerPlan, context: TimestepContext, timing: Timing | None = None) -> Execution:
    """Make ``layer`` run as ``plan`` says, in place, and note how on ``layer.execution``.

    Args:
        layer: the full-precision layer.
        plan: its decisions.
        context: the context attached to the denoiser.
        timing: how long it takes in integers and in floating point; it stays in floating point where that is faster.

    Returns:
        How the layer runs from now on.
    """
    if not plan.quantized:
        return mark_full_precision(layer, plan, "")
    weight = _weight(layer)
    dtype = str(weight.dtype).removeprefix("torch.")
    reason = unsupported_reason(layer, plan)
    if reason:
        state = "weight-only" if plan.activation is None else "simulated"
        lower_to_float(layer, folded(layer, plan), context)
        execution = Execution(state, plan.width, "", dtype, reason)
    elif timing is not None and not timing.integer_pays:
        execution = Execution("full precision", plan.width, "", dtype, str(timing))
    else:
        integer = integer_class(type(layer)).from_float(layer, folded(layer, plan), context)
        kernel = kernel_for(integer.operator, weight.device)
        name = OWN_KERNEL if own_kernel(integer) else kernel.name
        execution = Execution("integer", plan.width, name, kernel.compute, str(timing or ""))
    execution = execution.stored_by(layer)
    layer.execution = execution  # type: ignore[assignment]
    return execution


def own_kernel(layer: IntegerLayer) -> bool:
    """Whether a kernel of ours multiplies in an integer layer; see `dq_torchao.kernels.product`."""
    weight = torch.empty(0, dtype=layer.weight_dtype, device=layer.weight_packed.device)
    if weight.device.type != "cpu" or not takes(kernel_dtype(weight), None):
        return False
    if layer.operator == "linear":
        return True
    return takes_conv2d(layer.weight_shape, getattr(layer, "groups", 1), getattr(layer, "output_padding", ()))


def mark_full_precision(layer: nn.Module, plan: LayerPlan, reason: str) -> Execution:
    """Note on ``layer.execution`` that it runs as it did: for ``reason``, unless the plan has one."""
    weight = _weight(layer) if plan.quantized else next(layer.parameters())  # a kept layer may have none of this name
    dtype = str(weight.dtype).removeprefix("torch.")
    why = reason if plan.quantized else plan.why or reason
    execution = Execution("full precision", plan.width, "", dtype, why).stored_by(layer)
    layer.execution = execution  # type: ignore[assignment]
    return execution


def lower_to_float(layer: nn.Module, plan: LayerPlan, context: TimestepContext) -> None:
    """Make ``layer`` compute the quantized values in floating point, in place, its weight packed where it can be."""
    weight = plan.weight if can_pack(layer, plan.weight) else None
    if weight is not None:
        pack_layer(layer, weight, transform_of(plan))
    simulate_layer(layer, plan if weight is None else replace(plan, weight=None), context)


@torch.no_grad()
def folded(layer: nn.Module, plan: LayerPlan) -> LayerPlan:
    """Make a bias correction that does not depend on the timestep part of the layer's bias, in place.

    Returns:
        What is left of the plan.
    """
    correction, kind = plan.bias_correction, exact_kind(layer)
    if correction is None or len(correction.values) > 1 or kind is None or kind.lookup:
        return plan
    own, weight = layer.bias, _weight(layer)
    like = own if isinstance(own, Tensor) else weight.new_zeros(correction.values.shape[1])
    bias = (like.float() + correction.values[0].to(like.device)).to(like.dtype)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return replace(plan, bias_correction=None)


def _weight(layer: nn.Module) -> Tensor:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        raise PlanError(
            f"a {type(layer).__name__} of the plan has no weight tensor: it cannot be quantized, or it is already. "
            "Apply a plan to the full-precision denoiser."
        )
    return weight
