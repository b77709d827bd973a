"""Read a plan off a Brevitas model: what was trained or calibrated there becomes data any backend can lower.

Weights are read as integer codes, so the arithmetic that produced them (division, reciprocal, learned rounding, GPTQ)
does not matter afterwards. Activation tables are read as scales and zero points.
"""

from __future__ import annotations

from dataclasses import replace

from dq_brevitas import host  # noqa: F401  isort: skip
import torch
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector
from brevitas.quant_tensor import IntQuantTensor
from torch import Tensor, nn

from dq_brevitas.balanced import balance_of, read_balance
from dq_brevitas.corrected import CorrectionProxy
from dq_brevitas.dynamic import TokenActQuantProxyFromInjector
from dq_brevitas.plain import float_model, plain_kind
from dq_brevitas.proxy import TimestepActQuantProxyFromInjector
from dq_brevitas.weights import quantized_layers
from dq_plugins.affine import per_row
from dq_plugins.errors import PlanError
from dq_plugins.hashing import weights_hash
from dq_plugins.plan import ActivationQuant, InputQuant, LayerPlan, PassRecord, QuantPlan, Reason, WeightQuant
from dq_plugins.timesteps import Schedule, TimestepGroups, argument_of, context_of

ALL_TIMESTEPS = "all-timesteps"
"""Groups of the stock per-tensor quantizers: one for every timestep."""

NOT_QUANTIZED = Reason("not quantized in the Brevitas model")


def plan_from_model(
    model: nn.Module,
    schedule: Schedule,
    *,
    base: QuantPlan | None = None,
    original: nn.Module | None = None,
    timestep: str | None = None,
) -> QuantPlan:
    """The plan that a Brevitas model carries out.

    Apply it to ``float_model(model)``, whose weights are the trained ones.

    Args:
        model: a denoiser quantized with Brevitas: calibrated, trained, or made from a plan.
        schedule: timesteps of the sampling the plan is for.
        base: the plan the model came from; what is not about quantizers of layers is kept from it.
        original: the denoiser the model was made from; needed where a temporal table has replaced layers.
        timestep: name of the timestep argument, for a model without a timestep context.

    Returns:
        The plan, for the weights of ``float_model(model)``.

    Raises:
        PlanError: a quantizer does what a plan cannot say; the message names it.
    """
    context = context_of(model)
    groups = dict(context.groups) if context is not None else {}
    layers = dict(_read_layers(model, base))
    if any(
        isinstance(a := layer.activation, ActivationQuant) and a.groups == ALL_TIMESTEPS for layer in layers.values()
    ):
        groups[ALL_TIMESTEPS] = TimestepGroups()
    argument = timestep or argument_of(model) or (base.timestep_argument if base else None)
    if argument is None:
        raise PlanError("the model has no timestep context; name its timestep argument with timestep='...'")
    name, model_hash = type(model).__name__, weights_hash(float_model(model, original))
    plan = QuantPlan(name, model_hash, argument, schedule)
    if base is not None:
        plan = replace(base, model=name, model_hash=model_hash, timestep_argument=argument, schedule=schedule)
    passes = [*plan.passes, PassRecord("read-brevitas")]
    return replace(plan, groups={**plan.groups, **groups}, layers=layers, passes=passes).validate()


def _read_layers(model: nn.Module, base: QuantPlan | None) -> list[tuple[str, LayerPlan]]:
    read = []
    for name, layer in quantized_layers(model).items():
        for part in ("output_quant", "bias_quant"):
            if getattr(layer, part).is_quant_enabled:
                raise PlanError(f"layer {name!r} has an enabled {part}, which a plan cannot say; use {part}=None")
        weight = read_weight(name, layer) if layer.weight_quant.is_quant_enabled else None
        activation = read_activation(name, layer.input_quant) if layer.input_quant.is_quant_enabled else None
        known = base.layers.get(name) if base else None
        kind = known.kind if known else plain_kind(name, layer).name
        correction = layer.output_quant.table() if isinstance(layer.output_quant, CorrectionProxy) else None
        complete = weight is not None and activation is not None
        reason = None if complete else (known and known.unquantized_reason) or NOT_QUANTIZED
        roles = known.roles if known else frozenset()
        read.append(
            (
                name,
                LayerPlan(
                    kind, roles, weight, activation, reason, balance=read_balance(layer), bias_correction=correction
                ),
            )
        )
    have = {name for name, _ in read}
    read += [(n, layer) for n, layer in (base.layers.items() if base else ()) if n not in have]
    return sorted(read)


@torch.no_grad()
def read_weight(name: str, layer: nn.Module) -> WeightQuant:
    """The weight quantizer of a Brevitas layer.

    Args:
        name: of the layer, for messages.
        layer: with an enabled ``weight_quant``.

    Raises:
        PlanError: its weights are not one integer each, times a scale per tensor or per output channel.
    """
    proxy = layer.weight_quant
    training = proxy.training
    proxy.eval()
    quantized, balance = layer.quant_weight(), balance_of(proxy)
    # metadata has the scale of every output and input channel, the quantizer has that of every output
    own_scale = quantized.scale if balance is None else proxy.tensor_quant(layer.weight)[1]
    proxy.train(training)
    if not isinstance(quantized, IntQuantTensor) or quantized.value.shape != layer.weight.shape:
        raise PlanError(f"layer {name!r} has a {type(proxy).__name__}, whose weights are not one integer each")
    bits = int(quantized.bit_width)
    scale = _per_channel(own_scale, layer.weight, f"weight scale of {name!r}")
    zero_point = _per_channel(quantized.zero_point.expand_as(own_scale), layer.weight, f"zero point of {name!r}")
    value = quantized.value.float() if balance is None else quantized.value.float() * balance.to(layer.weight.device)
    exact = value / per_row(scale, value) + per_row(zero_point, value)
    if not torch.allclose(exact, exact.round(), atol=0.01) or bool((zero_point != zero_point.round()).any()):
        raise PlanError(
            f"the weights of layer {name!r} are not integers times a scale (several bases, or a zero point that is not "
            "an integer), which a plan cannot say; freeze or bake the quantizer first"
        )
    codes = exact.round()
    if bits == 1 and torch.equal(codes, torch.where(layer.weight >= 0, 1.0, -1.0)):
        return WeightQuant(1, scale.cpu(), scheme="binary")
    bits = max(bits, 2)  # signs that are not those of the weight are codes -1 and +1 of two bits
    offset = 0 if quantized.signed else 2 ** (bits - 1)
    codes, zero_point = codes - offset, zero_point.round() - offset
    return WeightQuant(
        bits=bits,
        scale=scale.cpu(),
        zero_point=zero_point.to(torch.int32).cpu() if bool(zero_point.any()) else None,
        codes=codes.to(torch.int8 if bits <= 8 else torch.int16).cpu(),
    )


def _per_channel(parameter: Tensor, weight: Tensor, what: str) -> Tensor:
    """``[O]`` or ``[1]`` from whatever shape Brevitas gives a parameter per output channel or per tensor."""
    per_channel = (weight.shape[0], *[1] * (weight.dim() - 1))
    if parameter.numel() != 1 and tuple(parameter.shape) != per_channel:
        raise PlanError(
            f"the {what} has shape {tuple(parameter.shape)}; a plan has one per tensor or one per output channel, "
            f"{per_channel}"
        )
    return parameter.detach().float().reshape(-1)


@torch.no_grad()
def read_activation(name: str, proxy: nn.Module) -> InputQuant:
    """The quantizer of a Brevitas layer's input.

    Args:
        name: of the layer, for messages.
        proxy: its ``input_quant``, enabled and calibrated.

    Raises:
        PlanError: it was never calibrated, or quantizes in a way that a plan cannot say.
    """
    if isinstance(proxy, TokenActQuantProxyFromInjector):
        return proxy.planned
    if _never_calibrated(proxy):
        raise PlanError(f"the input quantizer of layer {name!r} was never calibrated; use calibration_mode first")
    if isinstance(proxy, TimestepActQuantProxyFromInjector):
        groups, scale, zero_point = proxy.groups, proxy.scale_table(), proxy.zero_point_table()
    elif type(proxy) is ActQuantProxyFromInjector:
        groups, scale, zero_point = ALL_TIMESTEPS, proxy.scale(), proxy.zero_point()
    else:
        raise PlanError(f"the input quantizer of {name!r} is a {type(proxy).__name__}, which a plan cannot say")
    if scale.numel() != 1 and groups == ALL_TIMESTEPS:
        raise PlanError(f"the input of layer {name!r} has a scale of shape {tuple(scale.shape)}, not one per tensor")
    if proxy.is_narrow_range:
        raise PlanError(f"the input quantizer of {name!r} has a narrow range; a plan uses every code")
    bits = int(proxy.bit_width())
    scale = scale.detach().float().reshape(-1).cpu().clone()
    zero_point = zero_point.detach().float().expand_as(scale.to(zero_point.device)).reshape(-1).cpu()
    if not torch.equal(zero_point, zero_point.round()):
        raise PlanError(f"the zero points of the input of {name!r} are not integers; set quantize_zero_point=True")
    offset = 0 if proxy.is_signed else 2 ** (bits - 1)
    return ActivationQuant(bits, groups, scale, (zero_point - offset).to(torch.int32))


def _never_calibrated(proxy: nn.Module) -> bool:
    # a range that still has its starting value is what leaves no value in the state
    learned = [m for m in proxy.modules() if hasattr(m, "collect_stats_steps")]
    return any("value" not in module.state_dict() for module in learned)
