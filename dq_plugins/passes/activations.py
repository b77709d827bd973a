"""What the activation passes share: which layers, how many bits, and statistics that are collected once per run."""

from __future__ import annotations

from dq_plugins.observers.statistics import ErrorTable, Statistics, collect
from dq_plugins.passes.weight_ranges import KEPT_BY_ROLE
from dq_plugins.plan import LayerPlan, QuantPlan
from dq_plugins.recipe import PassContext

DEFAULT_GROUPS = "default"
EDGE_ROLES = frozenset({"first", "last"})


def activation_bits(plan: QuantPlan, context: PassContext, bits: int | None, edge_bits: int) -> dict[str, int]:
    """Width of every layer's input, by layer; empty when activations stay in floating point.

    Args:
        plan: the plan.
        context: the run.
        bits: width; None takes the recipe's target.
        edge_bits: least width of the first and last layers.
    """
    width = bits if bits is not None else context.act_bits
    if width is None:
        return {}
    # an embedding reads indices: there is no activation to quantize
    infos = context.partition.layers.items()
    layers = [n for n, info in infos if n in plan.layers and info.kind != "embedding" and not _kept(plan.layers[n])]
    return {n: max(width, edge_bits) if plan.layers[n].roles & EDGE_ROLES else width for n in layers}


def _kept(layer: LayerPlan) -> bool:
    return layer.weight is None and (layer.kept or "").startswith(KEPT_BY_ROLE)


def statistics(context: PassContext, layers: tuple[str, ...]) -> Statistics:
    """Statistics of the inputs of layers by timestep; one pass over the calibration set, shared by later passes."""
    folder = context.workdir / "statistics" if context.workdir else None
    return context.shared(
        ("statistics", layers), lambda: collect(context.denoiser, context.calibration, layers, folder=folder)
    )


def error_tables(context: PassContext, bits: dict[str, int], *, symmetric: bool, power: float) -> dict[str, ErrorTable]:
    """Error tables of layers at their widths; shared by later passes."""
    found = statistics(context, tuple(sorted(bits)))
    key = ("error-tables", tuple(sorted(bits.items())), symmetric, power)
    return context.shared(key, lambda: found.error_tables(bits, symmetric=symmetric, power=power))
