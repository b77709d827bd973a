"""How long every layer takes at every pair of widths on this machine: a latency table for searches with a time budget.

Each layer is timed as `dq_torchao.apply` would run it, at the shapes the denoiser calls it with, in eager mode, side by
side with all its other widths. Layers alike are timed once. Where kernels compute several widths alike (4-bit weights
are multiplied as int8), their times are alike as well: a budget of time then says which layers run in integers and how
many steps there are, not how few bits they have.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dq_plugins.graph import partition
from dq_plugins.layer_kinds import kind_name
from dq_plugins.metrics.latency import compare_latency
from dq_plugins.plan import ActivationQuant, DynamicActivationQuant, LayerPlan, QuantPlan, WeightQuant
from dq_plugins.quantized.weight_scale import weight_parameters, weight_rows
from dq_plugins.quantized.width import Width
from dq_plugins.timesteps import TimestepContext, TimestepGroups
from dq_torchao.lowering import lower_layer
from dq_torchao.tuning import InputLayout, layer_key, record_layouts, time_forms
from dq_torchao.wrapped_forward import unwrapped_copy

GROUPS = "latency"


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of one denoiser call at the batch and image size it was measured with.

    Attributes:
        layers: by layer and width, ``{"conv_in": {"W8A8": 0.8, "full precision": 1.1}}``: the option
            ``latency_table`` of the passes ``bit-allocation`` and ``timestep-reduction``.
        overhead_ms: of a call outside these layers: the option ``call_latency`` of ``timestep-reduction``.
    """

    layers: dict[str, dict[str, float]]
    overhead_ms: float

    def options(self) -> dict[str, Any]:
        """Options of the pass ``timestep-reduction``."""
        return {"latency_table": self.layers, "call_latency": self.overhead_ms}


@torch.no_grad()
def latency_table(
    denoiser: nn.Module,
    example_inputs: Mapping[str, Any],
    weight_choices: Iterable[int] = (8,),
    act_choices: Iterable[int] = (8,),
    *,
    dynamic: Collection[str] = (),
    plan: QuantPlan | None = None,
    rounds: int = 15,
) -> LatencyTable:
    """Measure every layer of a denoiser in full precision and at every pair of widths.

    Layers whose input is not floating point (embeddings) are measured at every width of their weight. Layers that the
    call does not reach are missing.

    Args:
        denoiser: in full precision; left as it is.
        example_inputs: keyword arguments of one call, of the batch and image size to be fast at.
        weight_choices: widths of weights.
        act_choices: widths of inputs; none: weights alone are quantized.
        dynamic: layers whose ranges are dynamic, such as those of a plan for which ``layer.dynamic``.
        plan: whose balances, rotations and branches layers have at every width; none by default.
        rounds: timed calls of each form; the median counts.

    Raises:
        TraceError: the denoiser cannot be traced with these inputs.
    """
    inputs = dict(example_inputs)
    found = partition(denoiser, inputs)
    layers = {name: denoiser.get_submodule(name) for name in found.layers}
    layouts = {name: each for name, each in record_layouts(denoiser, layers, inputs).items() if each}
    weights, acts = tuple(weight_choices), tuple(act_choices) or (None,)
    known: dict[Hashable, dict[Width, float]] = {}
    table, floating = {}, 0.0
    for name, calls in layouts.items():
        layer, like = layers[name], _like(plan, name, name in dynamic)
        low_rank = like.low_rank and (like.low_rank.rank, like.low_rank.down.dtype)
        beside = low_rank, like.subspace and like.subspace.rank
        key = (layer_key(layer), tuple(calls), like.features, beside)
        if key not in known:
            own = acts if calls[0].dtype.is_floating_point else (None,)
            known[key] = _times(layer, calls, [Width(w, a) for w in weights for a in own], rounds, like)
        table[name] = {str(width): ms for width, ms in known[key].items()}
        floating += known[key][Width()]
    whole = compare_latency({"call": lambda: denoiser(**inputs)}, rounds=rounds)["call"].median
    return LatencyTable(table, max(whole - floating, 0.0))


def _times(
    layer: nn.Module, layouts: Sequence[InputLayout], widths: Iterable[Width], rounds: int, like: LayerPlan
) -> dict[Width, float]:
    """Time of all calls of one layer by width; `Width()` is full precision."""
    context = TimestepContext({GROUPS: TimestepGroups()}, "nearest")
    forms = {Width(): unwrapped_copy(layer)}
    for width in widths:
        forms[width] = unwrapped_copy(layer)
        lower_layer(forms[width], _plan(layer, width, like), context)
    device = next(layer.parameters()).device
    with context.select(0.0):
        calls = time_forms({str(width): form for width, form in forms.items()}, layouts, device, rounds=rounds)
    return {width: sum(latency.median for latency in calls[str(width)]) for width in forms}


def _like(plan: QuantPlan | None, name: str, dynamic: bool) -> LayerPlan:
    """What a layer has at every width."""
    own = LayerPlan("") if plan is None or name not in plan.layers else plan.layers[name]
    activation = DynamicActivationQuant(8) if dynamic else None
    parts = {name: getattr(own, name) for name in ("balance", "rotation", "low_rank", "subspace")}
    return LayerPlan("", activation=activation, **parts)


def _plan(layer: nn.Module, width: Width, like: LayerPlan) -> LayerPlan:
    """A plan of one layer at a width; its values do not matter for its speed."""
    assert width.weight is not None
    scale, _ = weight_parameters(weight_rows(layer), width.weight, method="minmax")
    weight, activation = WeightQuant(width.weight, scale.cpu()), None
    if width.activation is not None and like.dynamic:
        activation = DynamicActivationQuant(width.activation)
    elif width.activation is not None:
        activation = ActivationQuant(width.activation, GROUPS, torch.ones(1), torch.zeros(1, dtype=torch.int32))
    return replace(like, kind=kind_name(layer), weight=weight, activation=activation)
