"""A plan as torchao's own ``FqnToConfig``, as far as torchao's configs can say what a plan says.

What they can say: the width and symmetry of a weight per output channel, and in front of an int8 linear layer one
static activation range per tensor or a dynamic one per token. What they cannot: ranges that change with the timestep,
integer convolutions, learned rounding, temporal tables, the scales of weights (torchao takes min-max). `to_fqn_config`
names every layer that it leaves out, and why; `dq_torchao.apply` executes all of a plan.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerRow,
    PerTensor,
)

from dq_plugins.layer_kinds import LayerKind, exact_kind
from dq_plugins.plan import ActivationQuant, DynamicActivationQuant, LayerPlan, QuantPlan, WeightQuant
from dq_torchao.tuning import record_layouts


@dataclass(frozen=True)
class FqnLowering:
    """A plan in torchao's configs.

    Attributes:
        config: one config for every layer that can be expressed, by its exact name; for
            ``quantize_(denoiser, config, filter_fn=None)``. Every other layer stays in full precision.
        unexpressed: why the others that the plan quantizes cannot be expressed, by layer.
    """

    config: FqnToConfig
    unexpressed: dict[str, str]


def to_fqn_config(plan: QuantPlan, model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> FqnLowering:
    """Lower a plan to torchao's configs.

    Weight scales are torchao's own (min-max per output channel, ``max |w| / 127.5`` at 8 bits), whatever the plan's
    are. Static activation ranges are the plan's; configs that hold one cannot be written to JSON by torchao.

    Args:
        plan: the plan.
        model: the full-precision denoiser the plan was made for; it is left as it is.
        example_inputs: keyword arguments of one call of the denoiser. torchao's static config must know the number of
            dimensions of a layer's input; without them no static range can be expressed.

    Returns:
        The config, and what it leaves out.

    Raises:
        PlanError: the plan is of another model.
    """
    plan.check_model(model)
    ranks = {} if example_inputs is None else _input_ranks(model, plan, example_inputs)
    configs: OrderedDict[str, AOBaseConfig | None] = OrderedDict()
    unexpressed = _beyond(plan)
    for name, layer in plan.layers.items():
        if (layer.weight is None and layer.activation is None) or name in unexpressed:
            continue
        found = _layer_config(layer, model.get_submodule(name), ranks.get(name))
        if isinstance(found, str):
            unexpressed[name] = found
        else:
            configs[name] = found
    return FqnLowering(FqnToConfig(configs), unexpressed)


def _input_ranks(model: nn.Module, plan: QuantPlan, example_inputs: Mapping[str, Any]) -> dict[str, int]:
    """Number of dimensions of the input of every layer that sees inputs of one."""
    layers = {name: model.get_submodule(name) for name in plan.layers}
    with torch.no_grad():
        layouts = record_layouts(model, layers, example_inputs)
    ranks = {name: {len(each.shape) for each in seen} for name, seen in layouts.items()}
    return {name: found.pop() for name, found in ranks.items() if len(found) == 1}


def _beyond(plan: QuantPlan) -> dict[str, str]:
    """Layers about which the plan decides what torchao has no config for, beyond quantizers, and what that is."""
    named = {feature: frozenset(layers) for feature, layers in plan.features.items() if feature not in RANGES}
    named |= {"outlier_rows": frozenset(plan.outlier_rows)}
    named |= {"temporal_table": plan.tabulated}
    everywhere = [
        name for name, section in plan.sections.items() if section.critical
    ]  # who knows which layers it means
    found = {name: [f for f, layers in named.items() if name in layers] + everywhere for name in plan.layers}
    return {
        name: f"the plan has {' and '.join(what)} for it, which torchao has no config for"
        for name, what in sorted(found.items())
        if what
    }


def _layer_config(plan: LayerPlan, layer: nn.Module, rank: int | None) -> AOBaseConfig | str:
    """The config of one layer, or why there is none."""
    weight, activation = plan.weight, plan.activation
    if weight is None:
        return f"torchao has no config that quantizes the input of a layer alone, as {plan.width} does"
    kind = exact_kind(layer)
    if kind is None or kind.name not in ("linear", "conv2d"):
        return f"torchao's configs take linear layers and 2-d convolutions, and this is a {type(layer).__name__}"
    if weight.scheme != "affine" or weight.codes is not None:
        what = "binary" if weight.scheme == "binary" else "learned"
        return f"its weight codes are {what}, and torchao's configs round to nearest"
    if activation is None:
        return _weight_only(kind, layer, weight)
    return (
        _dynamic(plan, kind, weight, activation)
        if isinstance(activation, DynamicActivationQuant)
        else _static(plan, kind, rank)
    )


RANGES = {"dynamic_ranges", "clipped_ranges"}
"""Features about which `_dynamic` decides."""
NO_CONVOLUTION = "torchao's int8 tensor has no convolution"


def _weight_only(kind: LayerKind, layer: nn.Module, weight: WeightQuant) -> AOBaseConfig | str:
    shape = tuple(layer.weight.shape)  # type: ignore[arg-type,union-attr]
    if weight.bits > 8:
        return f"torchao's integer weights have 1 to 8 bits, and this one has {weight.bits}"
    if any(size > 1 for size in kind.kernel(shape)):
        return "torchao's integer weights give a convolution a scale for every kernel position, the plan one per output"
    if not kind.spatial and weight.bits == 8 and weight.symmetric:
        return Int8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False)
    if shape[1] == 1:
        return "torchao cannot take scales of a weight with one input"
    mapping = MappingType.SYMMETRIC if weight.symmetric else MappingType.ASYMMETRIC
    dtype = getattr(torch, f"int{weight.bits}")
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerAxis(0), mapping_type=mapping)


def _dynamic(
    plan: LayerPlan, kind: LayerKind, weight: WeightQuant, activation: DynamicActivationQuant
) -> AOBaseConfig | str:
    if kind.spatial:
        return NO_CONVOLUTION
    if weight.bits != 8 or not weight.symmetric or activation != DynamicActivationQuant(8):
        return f"torchao's dynamic config is W8A8 without zero points and clipping, and this is {plan.width}"
    return Int8DynamicActivationInt8WeightConfig(granularity=PerRow(), set_inductor_config=False)


def _static(plan: LayerPlan, kind: LayerKind, rank: int | None) -> AOBaseConfig | str:
    weight, activation = plan.weight, plan.activation
    assert weight is not None
    assert isinstance(activation, ActivationQuant)
    if kind.spatial:
        return NO_CONVOLUTION
    if (weight.bits, activation.bits) != (8, 8) or not weight.symmetric:
        return f"torchao's static config is W8A8 with symmetric weights, and this is {plan.width}" + (
            "" if weight.symmetric else " with a zero point"
        )
    scale, zero_point = _constant(activation.scale), _constant(activation.zero_point)
    if scale is None or zero_point is None:
        return f"its range changes over {len(activation.scale)} timestep groups, and torchao's static range is one"
    if rank is None:
        return "torchao's static config must know the number of dimensions of the input: pass example_inputs"
    shape = (1,) * rank
    symmetric = activation.symmetric
    return Int8StaticActivationInt8WeightConfig(
        act_quant_scale=scale.reshape(shape),
        act_quant_zero_point=None if symmetric else zero_point.to(torch.int8).reshape(shape),
        act_mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        granularity=[PerTensor(), PerRow()],
        set_inductor_config=False,
    )


def _constant(table: Tensor) -> Tensor | None:
    """The one value of a table, or None where it has several."""
    return table[:1].clone() if bool((table == table[0]).all()) else None
