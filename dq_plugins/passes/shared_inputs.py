"""Layers that a transform of their input is chosen for, those of one input together."""

from __future__ import annotations

from dataclasses import replace

from dq_plugins.plan import QuantPlan, Targets
from dq_plugins.plan.layers import EDGE_ROLES
from dq_plugins.quantized.input_rows import has_rows
from dq_plugins.recipe import PassContext

TRANSFORMING = ("channel-balance", "rotation", "low-rank")
"""Passes that change what weights and inputs are quantized: every range comes after them."""


def layers_by_input(context: PassContext, *, everywhere: bool = False) -> list[list[str]]:
    """Layers that multiply a part of the sample's path, those that read the same input together.

    Args:
        context: of the denoiser.
        everywhere: with layers that depend on the timestep or the conditions alone. Their inputs can be told apart by
            timestep, so that they gain less from a transform.
    """
    found: dict[str, list[str]] = {}
    for name, info in context.partition.layers.items():
        if (everywhere or info.signature == "sample") and has_rows(context.denoiser.get_submodule(name)):
            alike = f"{info.source} {info.kind}" if info.source and info.kind == "linear" else name
            found.setdefault(alike, []).append(name)
    return list(found.values())


def targets_of(name: str, plan: QuantPlan, context: PassContext) -> Targets:
    """The targets of a run as they hold for one layer: the first and the last are wider, and so are the inputs of those
    that depend on the timestep and the conditions alone."""
    targets = context.targets
    edge = targets.edge_bits if plan.layers[name].roles & EDGE_ROLES else 0
    condition = targets.condition_bits or 0 if context.partition.layers[name].signature != "sample" else 0
    act_bits = None if targets.act_bits is None else max(targets.act_bits, edge, condition)
    return replace(targets, weight_bits=max(targets.weight_bits, edge), act_bits=act_bits)
