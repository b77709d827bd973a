"""Whether the decisions about a layer fit that layer: the shapes of everything that is stored for its channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dq_plugins.layer_kinds import LAYER_KINDS, LayerKind, kind_of
from dq_plugins.plan.decisions import OutlierRows
from dq_plugins.plan.layers import LayerPlan


def misfit(plan: LayerPlan, layer: nn.Module) -> str:
    """What of a layer's plan is not for a layer of these shapes, as a clause; empty where all fits.

    Layers whose weight is not where PyTorch's classes have it are left to the adapters.
    """
    kind, weight = kind_of(layer), getattr(layer, "weight", None)
    if kind is None or not isinstance(weight, Tensor):
        return ""
    if plan.quantized and plan.kind in LAYER_KINDS and plan.kind != kind.name:
        return f"is planned as a {plan.kind} layer, and is a {kind.name} layer"
    groups = int(getattr(layer, "groups", 1))
    return _weight_misfit(plan, kind, weight) or _channel_misfit(plan, kind, weight, groups)


def rows_misfit(rows: OutlierRows, layer: nn.Module) -> str:
    """The same of the outlier rows of a linear layer."""
    weight: Any = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return ""
    found = (rows.outputs.shape[1], rows.inputs.shape[1])
    return "" if found == tuple(weight.shape) else f"has outlier rows of {found[1]} inputs and {found[0]} outputs"


def _weight_misfit(plan: LayerPlan, kind: LayerKind, weight: Tensor) -> str:
    quant = plan.weight
    if quant is None:
        return ""
    allowed = {1, weight.shape[0]} if kind.scale_per_row else {1}
    if len(quant.scale) not in allowed:
        return f"has {len(quant.scale)} weight scales, and its weight {tuple(weight.shape)} takes {_or(allowed)}"
    if quant.codes is not None and quant.codes.shape != weight.shape:
        return f"has weight codes of shape {tuple(quant.codes.shape)}, and its weight has {tuple(weight.shape)}"
    return ""


def _channel_misfit(plan: LayerPlan, kind: LayerKind, weight: Tensor, groups: int) -> str:
    inputs = weight.shape[kind.input_axis] * (groups if kind.spatial and kind.input_axis else 1)
    if plan.balance is not None and len(plan.balance) != inputs:
        return f"has a balance of {len(plan.balance)} channels, and {inputs} input channels"
    outputs = kind.outputs(weight.shape, groups)
    if plan.bias_correction is not None and plan.bias_correction.values.shape[1] != outputs:
        return f"has a bias correction of {plan.bias_correction.values.shape[1]} channels, and {outputs} outputs"
    return ""


def _or(numbers: set[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))
