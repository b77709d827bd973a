"""Choices of layers with what they cost, from quantizers and the denoiser's graph."""

from __future__ import annotations

import numpy as np

from dq_plugins.passes.allocation.problem import LatencyTable, time_of
from dq_plugins.passes.steps.space import LayerChoices
from dq_plugins.plan import QuantPlan
from dq_plugins.quantized.candidates import Candidates
from dq_plugins.quantized.width import Width
from dq_plugins.recipe import PassContext


def kept_widths(plan: QuantPlan) -> Candidates:
    """The quantizers that a plan has, as choices of one: for a search that leaves widths alone."""
    weights = {n: {p.weight.bits: p.weight} for n, p in plan.layers.items() if p.weight is not None}
    inputs = {n: {p.activation.bits: p.activation} for n, p in plan.layers.items() if p.activation is not None}
    return Candidates(weights, inputs, dict(plan.groups))


def layer_choices(candidates: Candidates, context: PassContext, latency: LatencyTable) -> tuple[LayerChoices, ...]:
    """Choices of all layers with candidates, cheapest widths first, with the cost of one denoiser call.

    Args:
        candidates: the quantizers.
        context: whose graph counts the operations; for the batch that was recorded.
        latency: measured times by layer and width; BitOps where it is empty.

    Raises:
        BudgetError: the latency table lacks a layer or a width.
    """
    choices = []
    for name in candidates.layers:
        weights: tuple[int | None, ...] = tuple(sorted(candidates.weights.get(name, {}))) or (None,)
        inputs: tuple[int | None, ...] = tuple(sorted(candidates.activations.get(name, {}))) or (None,)
        cost = np.empty((len(weights), len(inputs)))
        for i, w in enumerate(weights):
            for j, a in enumerate(inputs):
                cost[i, j] = time_of(latency, name, Width(w, a)) if latency else _bitops(context, name, w, a)
        choices.append(LayerChoices(name, weights, inputs, cost))
    return tuple(choices)


def _bitops(context: PassContext, name: str, weight: int | None, activation: int | None) -> float:
    full = 8 * context.denoiser.get_submodule(name).weight.element_size()  # type: ignore[union-attr, operator]
    return float(context.partition.layers[name].macs * (weight or full) * (activation or full))
