"""From stock activation quantizers to timestep quantizers, and from one group of these back to stock ones."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from dq_brevitas import host  # noqa: F401  isort: skip
import torch
from brevitas.core.quant import RescalingIntQuant
from brevitas.core.scaling import ParameterScaling
from brevitas.core.stats import SCALAR_SHAPE
from brevitas.core.zero_point import ParameterZeroPoint, ZeroZeroPoint
from brevitas.inject import ExtendedInjector
from brevitas.inject.enum import StatsOp
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector, ActQuantProxyFromInjectorBase
from brevitas.quant.none import NoneActQuant
from torch import Tensor, nn

from dq_brevitas.balanced import read_balance
from dq_brevitas.corrected import CorrectionProxy, timestep_parts
from dq_brevitas.dynamic import dynamic_inputs
from dq_brevitas.integer import ReciprocalIntQuant, TimestepIntQuant
from dq_brevitas.proxy import TimestepActQuantProxyFromInjector, restart_calibration, timestep_proxies
from dq_brevitas.quantizers import DEFAULT_GROUPS
from dq_brevitas.routing import attach_timesteps
from dq_brevitas.scaling import TimestepScaling, TimestepZeroPoint
from dq_brevitas.weights import quantized_layers
from dq_plugins.errors import DQError, TimestepError
from dq_plugins.timesteps import TimestepGroups, context_of, detach_context

P = TypeVar("P", bound=ActQuantProxyFromInjector)


def convert_to_timestep(
    model: nn.Module,
    groups: int | TimestepGroups,
    *,
    skip: Collection[str] = (),
    recalibrate: bool = True,
    **routing: Any,
) -> nn.Module:
    """Give every static per-tensor activation quantizer of ``model`` one range per timestep group.

    A calibrated quantizer's range becomes the range of all its groups, so the model computes the same as before until
    it is calibrated or trained.

    Args:
        model: a denoiser quantized by Brevitas; changed in place.
        groups: the timestep groups, as for `attach_timesteps`.
        skip: names of quantizers (``"conv_in.input_quant"``) to leave as they are.
        recalibrate: let the next ``calibration_mode`` or the first training steps collect ranges per group; False keeps
            the ranges and trains on from them.
        routing: further arguments of `attach_timesteps`.

    Returns:
        ``model``.

    Raises:
        DQError: a quantizer has no static per-tensor integer range, or nothing is left to convert.
    """
    named: dict[nn.Module, nn.Module] = {}
    for name, old in _activation_proxies(model, skip).items():
        named[old] = _converted(name, old)
    if not named:
        raise DQError(f"{type(model).__name__} has no activation quantizer to convert; quantize it with Brevitas first")
    _replace_modules(model, named)
    attach_timesteps(model, groups, **routing)
    for old, new in named.items():
        _keep_ranges(old, new)
    return restart_calibration(model) if recalibrate else model


def _activation_proxies(model: nn.Module, skip: Collection[str]) -> dict[str, nn.Module]:
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ActQuantProxyFromInjectorBase)
        and not isinstance(module, TimestepActQuantProxyFromInjector)
        and module.is_quant_enabled
    }
    unknown = sorted(set(skip) - set(found))
    if unknown:
        raise DQError(f"skip names {unknown[0]!r}, which is not an enabled activation quantizer of the model")
    return {name: module for name, module in found.items() if name not in skip}


def _converted(name: str, old: nn.Module) -> TimestepActQuantProxyFromInjector:
    quantizer = old.fused_activation_quant_proxy.tensor_quant
    scalar = type(old) is ActQuantProxyFromInjector and type(quantizer) is RescalingIntQuant
    if not scalar or old.quant_injector.scaling_shape != SCALAR_SHAPE:
        raise DQError(
            f"activation quantizer {name!r} ({type(old).__name__}) has no single static integer range that could be "
            f"split by timestep: a dynamic quantizer already follows the timestep. Leave it with skip=[{name!r}]."
        )
    reciprocal = isinstance(quantizer.int_quant, ReciprocalIntQuant)
    injector = old.quant_injector.let(
        proxy_class=TimestepActQuantProxyFromInjector,
        scaling_impl=TimestepScaling,
        int_quant=ReciprocalIntQuant if reciprocal else TimestepIntQuant,
        timestep_context=None,
        timestep_groups=DEFAULT_GROUPS,
        timestep_reduction="mean",
        timestep_rows=None,
    )
    if "scaling_stats_op" not in injector:  # a range given as a constant comes without a statistic
        injector = injector.let(scaling_stats_op=StatsOp.MAX)
    if not isinstance(quantizer.zero_point_impl, ZeroZeroPoint):
        injector = injector.let(zero_point_impl=TimestepZeroPoint)
    return _rebuilt(old, TimestepActQuantProxyFromInjector, injector)


def _keep_ranges(old: nn.Module, new: TimestepActQuantProxyFromInjector) -> None:
    before, after = old.fused_activation_quant_proxy.tensor_quant, new.tensor_quantizer
    _fill(after.scaling_impl, before.scaling_impl)
    if isinstance(after.zero_point_impl, TimestepZeroPoint):
        _fill(after.zero_point_impl, before.zero_point_impl)


def _fill(table: nn.Module, scalar: nn.Module) -> None:
    state = scalar.state_dict()
    value = state.get("value", getattr(scalar, "value", None))
    calibrated = "value" in state or not hasattr(scalar, "counter")
    if isinstance(value, Tensor) and calibrated:
        with torch.no_grad():
            table.value.copy_(value.expand(table.value.shape))
        table.collecting, table.known = False, True


def freeze_timestep_group(model: nn.Module, group: int | Mapping[str, int]) -> nn.Module:
    """A copy of ``model`` whose timestep quantizers are stock ones with the parameters of one group.

    The copy is right for the timesteps of that group only, needs no context, and goes through every export of Brevitas
    (``export_torch_qcdq``, for example, which can hold one scale per tensor).

    Args:
        model: a denoiser with timestep quantizers; not changed.
        group: the group, or one for each named set of groups that the model uses.

    Returns:
        The copy.

    Raises:
        TimestepError: no such group, or several sets of groups and one number.
        DQError: balanced input channels, for which stock quantizers have no factors, or dynamic ranges.

    Example:
        >>> graphs = [freeze_timestep_group(denoiser, g) for g in range(8)]  # doctest: +SKIP
    """
    context = context_of(model)
    if context is None:
        raise TimestepError("the model has no timestep context; call dq_brevitas.attach_timesteps(model, groups) first")
    if dynamic := dynamic_inputs(model):
        raise DQError(
            f"the input of layer {next(iter(dynamic))!r} has dynamic ranges, for which no group has "
            "parameters; give it ranges by timestep group"
        )
    for name, layer in quantized_layers(model).items():
        if read_balance(layer) is not None:
            raise DQError(
                f"layer {name!r} has balanced input channels, for which stock quantizers have no factors; leave the "
                "pass 'channel-balance' out of the recipe"
            )
    used = {str(part.groups) for part in timestep_parts(model).values()}
    if isinstance(group, int) and len(used) > 1:
        raise TimestepError(f"the model uses timestep groups {sorted(used)}: freeze with one group of each, as a dict")
    chosen = {name: group if isinstance(group, int) else group.get(name, -1) for name in used}
    for name, index in chosen.items():
        if not 0 <= index < len(context.groups[name]):
            raise TimestepError(f"groups {name!r} are 0 to {len(context.groups[name]) - 1}, asked to freeze {index}")
    frozen = copy.deepcopy(model)
    replacement = {p: _frozen(p, chosen[p.groups]) for p in timestep_proxies(frozen).values() if p.is_quant_enabled}
    _replace_modules(frozen, replacement)
    for layer in quantized_layers(frozen).values():
        if isinstance(layer.output_quant, CorrectionProxy):
            _into_bias(layer, chosen)
    detach_context(frozen)
    return frozen


@torch.no_grad()
def _into_bias(layer: nn.Module, chosen: Mapping[str, int]) -> None:
    """Make the row of the chosen group part of the layer's bias."""
    table, weight, bias = layer.output_quant.table(), layer.weight, layer.bias  # type: ignore[operator]
    row = table.values[chosen[table.groups] if table.groups is not None else 0].to(weight.device, weight.dtype)
    layer.bias = nn.Parameter(row if bias is None else bias + row)
    layer.output_quant = ActQuantProxyFromInjector(layer, NoneActQuant)


def _frozen(proxy: TimestepActQuantProxyFromInjector, group: int) -> ActQuantProxyFromInjector:
    quantizer = proxy.tensor_quantizer
    entries = quantizer.scaling_impl.entries().detach()
    injector = proxy.quant_injector.let(
        proxy_class=ActQuantProxyFromInjector,
        scaling_impl=ParameterScaling,
        scaling_init=entries[group].clone(),
    )
    if isinstance(quantizer.zero_point_impl, TimestepZeroPoint):
        zero_points = quantizer.zero_point_impl.entries().detach()
        injector = injector.let(zero_point_impl=ParameterZeroPoint, zero_point_init=zero_points[group].clone())
    return _rebuilt(proxy, ActQuantProxyFromInjector, injector).to(entries.device)


def _rebuilt(old: nn.Module, made: type[P], injector: type[ExtendedInjector]) -> P:
    new = made(old.tracked_module_list[0], injector)
    for layer in old.tracked_module_list[1:]:
        new.add_tracked_module(layer)
    return new.train(old.training)


def _replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put the values of ``replacements`` where their keys are, under every name they have: what is shared stays so."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(name, replacements[module])
