"""Pass ``activation-ranges``: the clip range of every layer's input in every timestep group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from dq_plugins import registry
from dq_plugins.affine import affine_parameters
from dq_plugins.observers.grouping import best_candidates
from dq_plugins.observers.observing import observe_groups
from dq_plugins.passes.activations import (
    DEFAULT_GROUPS,
    activation_bits,
    error_tables,
    group_names,
    shared_rows,
    statistics,
)
from dq_plugins.plan import ActivationQuant, QuantPlan, Reason
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.timesteps import TimestepGroups

Ranges = dict[str, tuple[Tensor, Tensor]]
NO_INPUT = Reason("it reads indices, not activations", "no-input")
WEIGHT_ONLY = Reason("activations stay in floating point, as asked", "weight-only")
NO_WEIGHT = Reason("its weight has no quantizer")
FROM_STATISTICS = ("mse", "minmax")  # observers that the collected statistics answer, without another run


class ActivationRanges(Pass):
    """Write every layer's activation quantizer."""

    name = "activation-ranges"
    after = ("calibration-timesteps", "timestep-groups")

    class Options(PassOptions):
        """Options of ``activation-ranges``.

        Attributes:
            observer: ``"mse"`` (least error among candidate ranges, the same that ``timestep-groups`` compares),
                ``"minmax"``, or any other registered observer.
            bits: width; None takes the recipe's target.
            edge_bits: least width of the first and last layers.
            symmetric: zero point 0.
            power: p of the error norm of ``"mse"``.
        """

        observer: str = "mse"
        bits: int | None = Field(None, ge=2, le=16)
        edge_bits: int = Field(8, ge=2, le=16)
        symmetric: bool = False
        power: float = Field(2.0, gt=0)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Choose the ranges; without ``timestep-groups`` before, one range holds for all timesteps."""
        o = self.options
        bits = activation_bits(plan, context, o.bits, o.edge_bits)
        for name, layer in plan.layers.items():
            if name not in bits and layer.weight is not None:
                layer.unquantized_reason = NO_INPUT if bits else WEIGHT_ONLY
        if not bits:
            return
        low, high = context.calibration.timestep_range
        plan.groups.setdefault(DEFAULT_GROUPS, TimestepGroups((), low, high))
        names = group_names(plan, bits)
        if self.options.observer in FROM_STATISTICS:
            statistics(context, tuple(sorted(bits)))  # of all layers at once, however many sets of groups there are
        ranges: Ranges = {}
        for groups in dict.fromkeys(names.values()):
            members = {name: width for name, width in bits.items() if names[name] == groups}
            ranges |= self.ranges(context, members, plan.groups[groups], shared_rows(plan, groups))
        for done, (name, width) in enumerate(bits.items()):
            scale, zero_point = affine_parameters(*ranges[name], width, symmetric=o.symmetric)
            layer = plan.layers[name]
            layer.activation = ActivationQuant(width, names[name], scale.cpu(), zero_point.cpu())
            layer.unquantized_reason = None if layer.weight is not None else NO_WEIGHT
            yield Progress(done + 1, len(bits), name)

    def ranges(
        self, context: PassContext, bits: dict[str, int], groups: TimestepGroups, rows: Tensor | None = None
    ) -> Ranges:
        """Clip bounds ``low [G]`` and ``high [G]`` of every layer that ``bits`` names, at its width.

        Args:
            context: the run.
            bits: width by layer.
            groups: timestep groups.
            rows: which range each group uses, ``[G]``; groups of one number share theirs. None: each has its own.
        """
        rows = torch.arange(len(groups)) if rows is None else rows
        if self.options.observer not in FROM_STATISTICS:
            observer = registry.get("observer", self.options.observer)
            return observe_groups(
                context.denoiser,
                context.calibration,
                tuple(sorted(bits)),
                lambda name: observer(bits=bits[name], symmetric=self.options.symmetric),
                groups,
                rows,
                balance=context.balance,
            )
        membership = rows[_membership(context, groups)]
        choose = self._least_error if self.options.observer == "mse" else self._extremes
        found = choose(context, bits, membership, int(rows.max()) + 1)
        return {name: (low[rows], high[rows]) for name, (low, high) in found.items()}

    def _least_error(self, context: PassContext, bits: dict[str, int], membership: Tensor, count: int) -> Ranges:
        tables = error_tables(context, bits, symmetric=self.options.symmetric, power=self.options.power)
        chosen = {name: best_candidates(table, membership, count) for name, table in tables.items()}
        return {name: (tables[name].low[index], tables[name].high[index]) for name, index in chosen.items()}

    def _extremes(self, context: PassContext, bits: dict[str, int], membership: Tensor, count: int) -> Ranges:
        found = statistics(context, tuple(sorted(bits)))
        ranges = {}
        for name in bits:
            low, high = found.low(name).float(), found.high(name).float()
            # a group without recorded timesteps gets the range of all of them
            start = torch.full((count,), float(low.min())), torch.full((count,), float(high.max()))
            ranges[name] = (
                start[0].scatter_reduce(0, membership, low, "amin", include_self=False),
                start[1].scatter_reduce(0, membership, high, "amax", include_self=False),
            )
        return ranges


def _membership(context: PassContext, groups: TimestepGroups) -> Tensor:
    """Group of every recorded timestep, int64 ``[T]``."""
    return torch.tensor([groups.of(t) for t in context.calibration.timesteps])
