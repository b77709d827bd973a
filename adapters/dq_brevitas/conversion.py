"""Turn the activation quantizers of an already quantized model into timestep quantizers, in place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dq_brevitas import host  # noqa: F401  isort: skip
import torch
from brevitas.core.quant import RescalingIntQuant
from brevitas.core.stats import SCALAR_SHAPE
from brevitas.core.zero_point import ZeroZeroPoint
from brevitas.inject.enum import StatsOp
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector, ActQuantProxyFromInjectorBase
from torch import Tensor, nn

from dq_brevitas.coverage import restart_calibration
from dq_brevitas.integer import ReciprocalIntQuant, TimestepIntQuant
from dq_brevitas.proxy import TimestepActQuantProxyFromInjector
from dq_brevitas.quantizers import DEFAULT_GROUPS
from dq_brevitas.replacing import replace_modules
from dq_brevitas.routing import attach_timesteps
from dq_brevitas.scaling import TimestepScaling, TimestepZeroPoint
from dq_plugins.errors import DQError
from dq_plugins.timesteps import TimestepGroups


def convert_to_timestep(
    model: nn.Module,
    groups: int | TimestepGroups | Mapping[str, TimestepGroups],
    *,
    use: str = DEFAULT_GROUPS,
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
        use: name of the groups the quantizers use, when ``groups`` are several.
        skip: names of quantizers (``"conv_in.input_quant"``) to leave as they are.
        recalibrate: let the next ``calibration_mode`` or the first training steps collect ranges per group; False keeps
            the ranges and trains on from them.
        routing: further arguments of `attach_timesteps`.

    Returns:
        ``model``.

    Raises:
        DQError: a quantizer has no static per-tensor integer range, or nothing is left to convert.
    """
    known = {DEFAULT_GROUPS: groups} if isinstance(groups, TimestepGroups) else groups
    named: dict[nn.Module, nn.Module] = {}
    for name, old in _activation_proxies(model, skip).items():
        named[old] = _converted(name, old, use)
    if not named:
        raise DQError(f"{type(model).__name__} has no activation quantizer to convert; quantize it with Brevitas first")
    replace_modules(model, named)
    attach_timesteps(model, known, **routing)
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


def _converted(name: str, old: nn.Module, groups: str) -> TimestepActQuantProxyFromInjector:
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
        timestep_groups=groups,
        timestep_reduction="mean",
    )
    if "scaling_stats_op" not in injector:  # a range given as a constant comes without a statistic
        injector = injector.let(scaling_stats_op=StatsOp.MAX)
    if not isinstance(quantizer.zero_point_impl, ZeroZeroPoint):
        injector = injector.let(zero_point_impl=TimestepZeroPoint)
    new = TimestepActQuantProxyFromInjector(old.tracked_module_list[0], injector)
    for layer in old.tracked_module_list[1:]:
        new.add_tracked_module(layer)
    return new.train(old.training)


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
