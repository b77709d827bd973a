"""What the activation passes share: which layers, how many bits, and statistics that are collected once per run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dq_plugins.hashing import hash_tensors
from dq_plugins.observers.error import ErrorTable
from dq_plugins.plan import LayerPlan, QuantPlan
from dq_plugins.quantized.statistics import Statistics, collect
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
    layers = [n for n, info in infos if n in plan.layers and not info.lookup and not _left_alone(plan.layers[n])]
    return {n: max(width, edge_bits) if plan.layers[n].roles & EDGE_ROLES else width for n in layers}


def _left_alone(layer: LayerPlan) -> bool:
    return layer.weight is None and layer.unquantized_reason is not None and layer.unquantized_reason.code == "asked"


def statistics(context: PassContext, layers: tuple[str, ...]) -> Statistics:
    """Statistics of the inputs of layers by timestep; one pass over the calibration set, shared by later passes."""
    # by calibration set: a pass may have narrowed it
    known: list[Statistics] = context.shared(("statistics", _data(context)), list)
    for found in known:
        if set(layers) <= set(found.layers):
            return found
    folder = context.workdir / "statistics" if context.workdir else None
    known.append(collect(context.denoiser, context.calibration, layers, folder=folder, balance=context.balance))
    return known[-1]


def _data(context: PassContext) -> tuple[str, str]:
    """What statistics are of: the calls and the balance of the inputs."""
    return context.calibration.hash, hash_tensors(dict(context.balance))


def error_tables(context: PassContext, bits: dict[str, int], *, symmetric: bool, power: float) -> dict[str, ErrorTable]:
    """Error tables of layers at their widths; shared by later passes."""
    layers = tuple(sorted(bits))
    found = statistics(context, layers)

    def table(layer: str) -> ErrorTable:
        return found.error_table(layer, bits[layer], symmetric=symmetric, power=power)

    key = ("error-table", _data(context), symmetric, power)
    return {layer: context.shared((*key, layer, bits[layer]), lambda n=layer: table(n)) for layer in layers}


def group_names(plan: QuantPlan, layers: Iterable[str]) -> dict[str, str]:
    """Name of the timestep groups of each layer: its own where it has some, else the default's."""
    return {layer: layer if layer in plan.groups else DEFAULT_GROUPS for layer in layers}


def shared_rows(plan: QuantPlan, name: str) -> Tensor:
    """Which range each of the named groups uses, int64 ``[G]``: two groups of one number share theirs."""
    rows = plan.shared_rows.get(name)
    return torch.arange(len(plan.groups[name])) if rows is None else torch.tensor(rows)
