"""Quantizers at every width that bit allocation may choose, made the way the plan's own were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dq_plugins import registry
from dq_plugins.affine import affine_parameters
from dq_plugins.errors import RecipeError
from dq_plugins.observers.observer import Observer
from dq_plugins.observers.streaming import located, stream_inputs
from dq_plugins.passes.activations import input_ranges, observer_at, shared_rows
from dq_plugins.passes.attention import attention_quantizers, quantized_attentions
from dq_plugins.passes.binarization.binarize import binary_weight
from dq_plugins.plan import (
    ActivationQuant,
    AttentionPlan,
    DynamicActivationQuant,
    InputQuant,
    QuantPlan,
    Reason,
    WeightQuant,
)
from dq_plugins.plan.layers import NO_RANGES
from dq_plugins.quantized.attention import attending_module, site_name
from dq_plugins.quantized.candidates import Candidates
from dq_plugins.quantized.weight_scale import layer_quantizer, weight_rows
from dq_plugins.quantized.width import Width
from dq_plugins.recipe import PassContext

WIDEST_ATTENTION = 8
"""Most bits of an operand of an attention: products of wider codes have no kernel anywhere."""


def candidates_of(
    plan: QuantPlan, context: PassContext, weight_choices: Sequence[int], act_choices: Sequence[int]
) -> Candidates:
    """Candidates of every layer and every attention that the plan quantizes; shared by the passes of a run.

    Layers whose rounding another pass has learned stay as they are: they have no candidates.

    Args:
        plan: with weight quantizers, and with activation quantizers unless activations stay in floating point.
        context: the run.
        weight_choices: widths of weights; one bit is BinaryDM's: signs, scaled by the mean magnitude.
        act_choices: widths of inputs, and of the operands of attentions as far as these can have them.
    """
    attending = tuple(quantized_attentions(plan))
    key = ("candidates", tuple(weight_choices), tuple(act_choices), plan.range_methods, attending)
    return context.shared(key, lambda: _make(plan, context, weight_choices, act_choices))


def _make(
    plan: QuantPlan, context: PassContext, weight_choices: Sequence[int], act_choices: Sequence[int]
) -> Candidates:
    layers = [n for n, p in plan.layers.items() if p.weight is not None and p.weight.codes is None]
    if not layers:
        raise RecipeError("no layer has a weight quantizer that may change: run the pass 'weight-ranges' before")
    # in execution order, which is what tables and explanations are read in
    order = [name for name in context.partition.layers if name in set(layers)]
    activations = (
        activation_candidates(plan, context, order, act_choices) if context.targets.act_bits is not None else {}
    )
    attention = attention_candidates(plan, context, act_choices)
    used = {q.groups for widths in activations.values() for q in widths.values() if isinstance(q, ActivationQuant)}
    used |= {q.groups for each in attention.values() for a in each.values() for q in a.quantizers.values()}
    weights = {name: _weights(plan, context, name, weight_choices) for name in order}
    transforms = {name: context.transforms[name] for name in order if name in context.transforms}
    groups = {name: plan.groups[name] for name in sorted(used)}
    return Candidates(weights, activations, groups, transforms, plan.row_orders, attention)


def _weights(plan: QuantPlan, context: PassContext, name: str, choices: Sequence[int]) -> dict[int, WeightQuant]:
    layer, transform = context.denoiser.get_submodule(name), context.transforms.get(name)

    def quantizer(bits: int) -> WeightQuant:
        if bits == 1:  # codes -1 and 0 would lose half of a symmetric weight
            return binary_weight(weight_rows(layer, transform))
        return layer_quantizer(layer, bits, context.targets, method=plan.range_methods.weights, transform=transform)

    return {bits: quantizer(bits) for bits in choices}


def activation_candidates(
    plan: QuantPlan, context: PassContext, layers: Sequence[str], choices: Sequence[int]
) -> dict[str, dict[int, InputQuant]]:
    """Quantizers of layers' inputs at several widths, with the observer and the groups of the plan's own.

    Layers with exact tokens (``plan.outlier_rows``) get the range of their other tokens. Inputs with dynamic ranges
    have them at every width; what is cut off at one width is not at another.

    Args:
        plan: with an activation quantizer for every layer that is to have candidates.
        context: the run.
        layers: fully qualified names.
        choices: widths.
    """
    symmetric = context.targets.symmetric_acts
    exact = {name: rows.positions for name, rows in plan.outlier_rows.items()}
    by_groups: dict[str, list[str]] = {}
    found: dict[str, dict[int, InputQuant]] = {}
    for name in layers:
        activation = plan.layers[name].activation
        if isinstance(activation, DynamicActivationQuant):
            found[name] = {bits: _dynamic_at(bits, activation) for bits in choices}
        elif activation is not None:
            by_groups.setdefault(activation.groups, []).append(name)
    for groups, members in by_groups.items():
        rows = shared_rows(plan, groups)
        special = [name for name in members if name in exact]
        observers = _other_tokens(context, {n: exact[n] for n in special}, choices, plan.range_methods.inputs)
        for bits in choices:
            usual = dict.fromkeys((n for n in members if n not in exact), bits)
            bounds = input_ranges(context, usual, plan.groups[groups], plan.range_methods, rows) if usual else {}
            count = len(plan.groups[groups])
            bounds |= {n: tuple(torch.tensor(e).expand(count) for e in observers[n, bits].range()) for n in special}
            for name in members:
                scale, zero_point = affine_parameters(*bounds[name], bits, symmetric=symmetric)
                quant = ActivationQuant(bits, groups, scale.cpu(), zero_point.cpu())
                learned = plan.layers[name].activation if name in plan.learned_ranges else None
                found.setdefault(name, {})[bits] = learned if learned and learned.bits == bits else quant
    return found


def _dynamic_at(bits: int, quant: DynamicActivationQuant) -> DynamicActivationQuant:
    """The form of a width; where it is none of its own nothing is cut off: shares that were measured won nothing."""
    return next((form for form in quant.forms if form.bits == bits), DynamicActivationQuant(bits, quant.symmetric))


def attention_candidates(
    plan: QuantPlan, context: PassContext, choices: Sequence[int]
) -> dict[str, dict[int, AttentionPlan]]:
    """Quantizers of the operands of attentions at several widths, by `site_name`; those of the plan at its own width.

    Args:
        plan: the attentions that it quantizes have candidates.
        context: the run.
        choices: widths; codes of more than 8 bits have no definition, and are left out.
    """
    planned = {name: each for name, each in plan.attention.items() if each.quantized}
    widths = [bits for bits in choices if bits <= WIDEST_ATTENTION]
    if not planned or not widths:
        return {}
    found = attention_quantizers(plan, context, tuple(planned), widths)
    for name, each in planned.items():
        own = {bits for bits in widths if all(quant.bits == bits for quant in each.quantizers.values())}
        found[name] = {b: each if b in own else replace(a, rows=each.rows) for b, a in found[name].items()}
    return {site_name(name): each for name, each in found.items()}


def _other_tokens(
    context: PassContext, layers: Mapping[str, Sequence[int]], choices: Sequence[int], observer: str
) -> dict[tuple[str, int], Observer]:
    """One observer for each layer and width, that saw the tokens that are not exact.

    These inputs are conditions, which do not change with t: one range holds for every timestep group.
    """
    if not layers:
        return {}
    make = {bits: registry.function("observer", observer_at(observer, bits)) for bits in choices}
    observers = {(n, b): make[b](bits=b, symmetric=context.targets.symmetric_acts) for n in layers for b in choices}

    def receive(name: str, x: Tensor, timestep: float) -> None:
        others = [i for i in range(x.shape[1]) if i not in set(layers[name])]
        rest = x.index_select(1, torch.tensor(others, device=x.device))
        for bits in choices:
            with located(name, timestep):
                observers[name, bits].update(rest)

    source, transforms = (context.denoiser, context.calibration, tuple(layers)), context.transforms
    for _ in stream_inputs(*source, receive, transforms=transforms, rows=context.row_orders):
        pass
    return observers


def write_widths(plan: QuantPlan, widths: Mapping[str, Width], candidates: Candidates) -> None:
    """Put the quantizers of some widths into a plan, with the reason where an operand stays in full precision.

    Args:
        plan: changed in place.
        widths: by layer, and by `site_name`.
        candidates: holds a quantizer for each of them.
    """
    for name, width in widths.items():
        if (module := attending_module(name)) is not None:
            left = Reason("bit allocation leaves it in full precision: its products cost most there", "allocated")
            bits, rows = width.activation, plan.attention[module].rows
            full = AttentionPlan(unquantized_reason=left, rows=rows)
            plan.attention[module] = full if bits is None else candidates.attention[name][bits]
            continue
        layer = plan.layers[name]
        layer.weight = None if width.weight is None else candidates.weights[name][width.weight]
        activations = candidates.activations.get(name, {})
        layer.activation = None if width.activation is None else activations[width.activation]
        missing = [operand for operand, bits in zip(("weight", "input"), width, strict=True) if bits is None]
        if not missing:
            layer.unquantized_reason = None
        elif missing == ["input"] and not activations:
            layer.unquantized_reason = layer.unquantized_reason or NO_RANGES
        else:
            text = f"bit allocation leaves its {' and '.join(missing)} in full precision: it costs most there"
            layer.unquantized_reason = Reason(text, "allocated")
