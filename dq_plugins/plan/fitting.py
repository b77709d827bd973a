"""Whether the decisions about a layer fit that layer: the shapes of everything that is stored for its channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dq_plugins.layer_kinds import LAYER_KINDS, LayerKind, kind_of
from dq_plugins.plan.decisions import OutlierRows
from dq_plugins.plan.layers import LayerPlan, WeightQuant


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
    channels = _channel_misfit(plan, kind, weight, groups) or _transform_misfit(plan, kind, weight, groups)
    return _weight_misfit(plan, kind, weight) or channels


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
    return _group_misfit(quant, kind, weight)


def _group_misfit(quant: WeightQuant, kind: LayerKind, weight: Tensor) -> str:
    if quant.group_scale is None:
        return ""
    if not kind.scale_per_row or weight.dim() < 2:
        return f"has weight scales in groups of inputs, which a {kind.name} layer does not take"
    outputs, groups = quant.group_scale.shape
    if outputs == weight.shape[0] and weight.shape[1] % groups == 0:
        return ""
    return f"has weight scales of {outputs} outputs in {groups} groups of inputs, and a weight {tuple(weight.shape)}"


def _transform_misfit(plan: LayerPlan, kind: LayerKind, weight: Tensor, groups: int) -> str:
    if plan.rotation is None and plan.low_rank is None and plan.subspace is None:
        return ""
    if kind.lookup or kind.output_axis != 0:
        return f"has a rotation or a branch in floating point, which a {kind.name} layer does not take"
    channels, rotation, low_rank = weight.shape[1], plan.rotation, plan.low_rank
    if rotation is not None and channels % rotation.block:
        return f"has a rotation of blocks of {rotation.block}, and {channels} input channels"
    if rotation is not None and rotation.matrix is not None and len(rotation.matrix) * rotation.block != channels:
        return f"has a rotation of {len(rotation.matrix) * rotation.block} channels, and {channels} input channels"
    if (low_rank is not None or plan.subspace is not None) and groups > 1:
        return f"has a low-rank branch, or directions in floating point, and is a convolution with {groups} groups"
    if plan.subspace is not None and plan.subspace.basis.shape[1] != channels:
        found = plan.subspace.basis.shape[1]
        return f"has directions of {found} channels in floating point, and {channels} input channels"
    if low_rank is not None and (len(low_rank.up), low_rank.down.shape[1]) != weight.flatten(1).shape:
        found = (len(low_rank.up), low_rank.down.shape[1])
        return f"has a low-rank branch for a weight {found}, and its own is {tuple(weight.shape)}"
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
