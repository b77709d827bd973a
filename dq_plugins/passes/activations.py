"""What the activation passes share: which layers, how many bits, and statistics that are collected once per run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dq_plugins import registry
from dq_plugins.hashing import hash_json
from dq_plugins.observers.distribution import DistributionObserver
from dq_plugins.observers.error import ErrorTable
from dq_plugins.observers.grouping import best_candidates
from dq_plugins.observers.observing import observe_groups
from dq_plugins.observers.streaming import Receive
from dq_plugins.passes.shared_inputs import targets_of
from dq_plugins.plan import LayerPlan, QuantPlan, RangeMethods
from dq_plugins.quantized.sampled import SampledStatistics
from dq_plugins.quantized.statistics import Statistics, collect
from dq_plugins.recipe import PassContext
from dq_plugins.timesteps import TimestepGroups

WIDE = 8  # bits from which a clipped value costs more than a coarser step
DEFAULT_GROUPS = "default"

Ranges = dict[str, tuple[Tensor, Tensor]]
"""Clip bounds ``low [G]`` and ``high [G]`` by layer."""


def activation_bits(plan: QuantPlan, context: PassContext) -> dict[str, int]:
    """Width of every layer's input, by layer; empty when activations stay in floating point."""
    if context.targets.act_bits is None:
        return {}
    infos = context.partition.layers.items()
    # what looks a table up reads indices: there is no activation to quantize
    layers = [n for n, info in infos if n in plan.layers and not info.lookup and not _left_alone(plan.layers[n])]
    bits = {n: targets_of(n, plan, context).act_bits for n in layers}
    return {n: width for n, width in bits.items() if width is not None}


def _left_alone(layer: LayerPlan) -> bool:
    return layer.weight is None and layer.unquantized_reason is not None and layer.unquantized_reason.code == "asked"


def statistics(context: PassContext, layers: tuple[str, ...], also: Receive | None = None) -> Statistics:
    """Statistics of the inputs of layers by timestep; one pass over the calibration set, shared by later passes.

    Args:
        context: the run.
        layers: their names.
        also: told every input, if they have to be collected; then that is not resumed after an interruption.
    """
    if isinstance(context.calibration, SampledStatistics):
        return context.calibration.statistics
    # by calibration set: a pass may have narrowed it
    known: list[Statistics] = context.shared(("statistics", _data(context)), list)
    for found in known:
        if set(layers) <= set(found.layers):
            return found
    folder = context.workdir / "statistics" if context.workdir and also is None else None
    calls, samples = context.calibration, context.statistics_samples
    given = context.denoiser, calls if samples is None else calls.spread(len(calls), samples), layers
    known.append(collect(*given, folder=folder, transforms=context.transforms, rows=context.row_orders, also=also))
    return known[-1]


def _data(context: PassContext) -> tuple[str, str]:
    """What statistics are of: the calls and the transforms of the inputs."""
    return context.calibration.hash, hash_json({name: transform.hash for name, transform in context.transforms.items()})


def error_tables(
    context: PassContext, bits: Mapping[str, int], *, symmetric: bool, power: float
) -> dict[str, ErrorTable]:
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


def input_ranges(
    context: PassContext,
    bits: Mapping[str, int],
    groups: TimestepGroups,
    methods: RangeMethods,
    rows: Tensor | None = None,
) -> Ranges:
    """Clip bounds of the input of every layer that ``bits`` names, at its width.

    Args:
        context: the run.
        bits: width by layer.
        groups: timestep groups.
        methods: observer of inputs: ``"mse"`` (least error among candidate ranges), ``"minmax"``, a registered one, or
            ``"by-width"``: min-max from 8 bits, where a range that cuts nothing off makes the better images, else mse.
        rows: which range each group uses, ``[G]``; groups of one number share theirs. None: each has its own.
    """
    if methods.inputs == "by-width":
        by_observer: dict[str, dict[str, int]] = {}
        for name, width in bits.items():
            by_observer.setdefault(observer_at(methods.inputs, width), {})[name] = width
        ranges: Ranges = {}
        for observer, part in by_observer.items():
            ranges |= input_ranges(context, part, groups, replace(methods, inputs=observer), rows)
        return ranges
    rows = torch.arange(len(groups)) if rows is None else rows
    symmetric = context.targets.symmetric_acts
    if not from_statistics(methods.inputs):
        observer = registry.function("observer", methods.inputs)
        return observe_groups(
            context.denoiser,
            context.calibration,
            tuple(sorted(bits)),
            lambda name: observer(bits=bits[name], symmetric=symmetric),
            groups,
            rows,
            transforms=context.transforms,
            orders=context.row_orders,
        )
    # group of every recorded timestep, int64 [T]
    membership = rows[torch.tensor([groups.of(t) for t in context.calibration.timesteps])]
    count = int(rows.max()) + 1
    if methods.inputs == "minmax":
        found = _extremes(context, bits, membership, count)
    elif methods.inputs != "mse":
        found = _distributions(context, bits, membership, count, registry.function("observer", methods.inputs))
    else:
        tables = error_tables(context, bits, symmetric=symmetric, power=methods.power)
        chosen = {name: best_candidates(table, membership, count) for name, table in tables.items()}
        found = {name: (tables[name].low[index], tables[name].high[index]) for name, index in chosen.items()}
    return {name: (low[rows], high[rows]) for name, (low, high) in found.items()}


def observer_at(method: str, bits: int) -> str:
    """The registered observer that a method of ranges is at a width."""
    return ("minmax" if bits >= WIDE else "mse") if method == "by-width" else method


def from_statistics(observer: str) -> bool:
    """Whether the collected statistics answer a registered observer, without another run."""
    if observer in ("mse", "minmax", "by-width"):
        return True
    found = registry.function("observer", observer)
    return isinstance(found, type) and issubclass(found, DistributionObserver)


def _distributions(
    context: PassContext,
    bits: Mapping[str, int],
    membership: Tensor,
    count: int,
    make: type[DistributionObserver],
) -> Ranges:
    """Ranges that an observer chooses from the histograms of each group's timesteps."""
    found, ranges = statistics(context, tuple(sorted(bits))), {}
    for name, width in bits.items():
        observers = [make(bits=width, symmetric=context.targets.symmetric_acts) for _ in range(count + 1)]
        for place, group in enumerate(membership.tolist()):
            seen = found.at(name, place)
            for observer in (observers[group], observers[-1]):
                observer.take(seen, seen.histogram)
        # a group without recorded timesteps gets the range of all of them
        chosen = [(each if each.count else observers[-1]).range() for each in observers[:-1]]
        low, high = torch.tensor(chosen, dtype=torch.float32).T  # [G], [G]
        ranges[name] = (low, high)
    return ranges


def _extremes(context: PassContext, bits: Iterable[str], membership: Tensor, count: int) -> Ranges:
    found = statistics(context, tuple(sorted(bits)))
    ranges = {}
    for name in bits:
        ran = found.count(name) > 0  # a forward may run other layers early than late
        low, high, group = found.low(name).float()[ran], found.high(name).float()[ran], membership[ran]
        # a group without timesteps at which it ran gets the range of all of them
        start = torch.full((count,), float(low.min())), torch.full((count,), float(high.max()))
        ranges[name] = (
            start[0].scatter_reduce(0, group, low, "amin", include_self=False),
            start[1].scatter_reduce(0, group, high, "amax", include_self=False),
        )
    return ranges
