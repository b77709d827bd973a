"""One group of a timestep-quantized model as a plain Brevitas model, for tools that know no table."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from dq_brevitas import host  # noqa: F401  isort: skip
import torch
from brevitas.core.scaling import ParameterScaling
from brevitas.core.zero_point import ParameterZeroPoint
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector
from brevitas.quant.none import NoneActQuant
from torch import nn

from dq_brevitas.balanced import read_balance
from dq_brevitas.corrected import CorrectionProxy, timestep_parts
from dq_brevitas.proxy import TimestepActQuantProxyFromInjector, timestep_proxies
from dq_brevitas.replacing import replace_modules
from dq_brevitas.scaling import TimestepZeroPoint
from dq_brevitas.weights import quantized_layers
from dq_plugins.errors import DQError, TimestepError
from dq_plugins.timesteps import context_of, detach_context


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
        DQError: balanced input channels, for which stock quantizers have no factors.

    Example:
        >>> graphs = [freeze_timestep_group(denoiser, g) for g in range(8)]  # doctest: +SKIP
    """
    context = context_of(model)
    if context is None:
        raise TimestepError("the model has no timestep context; call dq_brevitas.attach_timesteps(model, groups) first")
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
    replace_modules(frozen, replacement)
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
    frozen = ActQuantProxyFromInjector(proxy.tracked_module_list[0], injector)
    for layer in proxy.tracked_module_list[1:]:
        frozen.add_tracked_module(layer)
    return frozen.to(entries.device).train(proxy.training)
