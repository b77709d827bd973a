"""Layers that a transform of their input is chosen for, those of one input together."""

from __future__ import annotations

from dataclasses import replace

from dq_plugins.plan import LayerPlan, Targets
from dq_plugins.plan.layers import EDGE_ROLES
from dq_plugins.quantized.input_rows import has_rows
from dq_plugins.recipe import PassContext

TRANSFORMING = ("channel-balance", "rotation", "low-rank")
"""Passes that change what weights and inputs are quantized: every range comes after them."""


def layers_by_input(context: PassContext) -> list[list[str]]:
    """Layers that multiply a part of the sample's path, those that read the same input together.

    Layers that depend on the timestep alone are left out: their inputs can be told apart by timestep.
    """
    found: dict[str, list[str]] = {}
    for name, info in context.partition.layers.items():
        if info.signature == "sample" and has_rows(context.denoiser.get_submodule(name)):
            alike = f"{info.source} {info.kind}" if info.source and info.kind == "linear" else name
            found.setdefault(alike, []).append(name)
    return list(found.values())


def targets_of(layer: LayerPlan, targets: Targets) -> Targets:
    """The targets of a run as they hold for one layer: the first and the last are wider."""
    if not layer.roles & EDGE_ROLES:
        return targets
    act_bits = None if targets.act_bits is None else max(targets.act_bits, targets.edge_bits)
    return replace(targets, weight_bits=max(targets.weight_bits, targets.edge_bits), act_bits=act_bits)
