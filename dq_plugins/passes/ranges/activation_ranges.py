"""Pass ``activation-ranges``: the clip range of every layer's input in every timestep group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from dq_plugins.affine import affine_parameters
from dq_plugins.passes.activations import (
    DEFAULT_GROUPS,
    Ranges,
    activation_bits,
    from_statistics,
    group_names,
    input_ranges,
    shared_rows,
    statistics,
)
from dq_plugins.plan import ActivationQuant, QuantPlan, Reason
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.timesteps import TimestepGroups

NO_INPUT = Reason("it reads indices, not activations", "no-input")
WEIGHT_ONLY = Reason("activations stay in floating point, as asked", "weight-only")
NO_WEIGHT = Reason("its weight has no quantizer")


class ActivationRanges(Pass):
    """Write every layer's activation quantizer."""

    name = "activation-ranges"
    after = ("calibration-timesteps", "timestep-groups")

    class Options(PassOptions):
        """Options of ``activation-ranges``.

        Attributes:
            observer: ``"mse"`` (least error among candidate ranges, the same that ``timestep-groups`` compares),
                ``"minmax"``, any other registered observer, or ``"by-width"``: min-max from 8 bits, else mse.
            power: p of the error norm of ``"mse"``.
        """

        observer: str = "mse"
        power: float = Field(2.0, gt=0)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Choose the ranges that are not learned; without ``timestep-groups`` before, one holds for all timesteps."""
        o = self.options
        bits = activation_bits(plan, context)
        plan.range_methods = replace(plan.range_methods, inputs=o.observer, power=o.power)
        for name, layer in plan.layers.items():
            if name not in bits and layer.weight is not None:
                layer.unquantized_reason = NO_INPUT if bits else WEIGHT_ONLY
        if not bits:
            return
        low, high = context.calibration.timestep_range
        plan.groups.setdefault(DEFAULT_GROUPS, TimestepGroups((), low, high))
        for name in plan.learned_ranges & bits.keys():
            plan.layers[name].unquantized_reason = None if plan.layers[name].weight is not None else NO_WEIGHT
            del bits[name]
        names = group_names(plan, bits)
        if bits and from_statistics(o.observer):
            statistics(context, tuple(sorted(bits)))  # of all layers at once, however many sets of groups there are
        ranges: Ranges = {}
        for groups in dict.fromkeys(names.values()):
            members = {name: width for name, width in bits.items() if names[name] == groups}
            rows = shared_rows(plan, groups)
            ranges |= input_ranges(context, members, plan.groups[groups], plan.range_methods, rows)
        for done, (name, width) in enumerate(bits.items()):
            scale, zero_point = affine_parameters(*ranges[name], width, symmetric=context.targets.symmetric_acts)
            layer = plan.layers[name]
            layer.activation = ActivationQuant(width, names[name], scale.cpu(), zero_point.cpu())
            layer.unquantized_reason = None if layer.weight is not None else NO_WEIGHT
            yield Progress(done + 1, len(bits), name)
