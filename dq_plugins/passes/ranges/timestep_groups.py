"""Pass ``timestep-groups``: which timesteps share activation ranges.

``dp`` finds the contiguous groups with the least summed quantization error over all layers, exactly; ``search`` learns
groups by gradient descent against the error of the denoiser's output (ADP-DM, Wang et al. 2024); ``uniform`` cuts the
schedule into equally many timesteps and is the baseline. The error curve over the number of groups stays in the plan,
so that a user sees what one more group buys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from dq_plugins.affine import affine_parameters
from dq_plugins.observers.grouping import Grouping, optimal_groups, uniform_groups
from dq_plugins.passes.activations import DEFAULT_GROUPS, activation_bits, error_tables
from dq_plugins.passes.ranges.search.decide import as_runs
from dq_plugins.passes.ranges.searched_groups import GroupSearch, SearchOptions, Tables
from dq_plugins.plan import ActivationQuant, QuantPlan, Section
from dq_plugins.plots import lines
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class GroupCurve:
    """Error over the number of groups.

    Attributes:
        groups: numbers of groups.
        relative_error: least error of the activations with as many, relative to their power, summed over layers.
        layer_error: by layer, its error with one range, with the groups, and with a range for each timestep.
        search: what the search found, if it ran.
    """

    groups: tuple[int, ...]
    relative_error: tuple[float, ...]
    layer_error: dict[str, dict[str, float]]
    search: dict[str, Any] | None = None


class TimestepGrouping(Pass):
    """Choose which timesteps share ranges."""

    name = "timestep-groups"
    after = ("calibration-timesteps",)

    class Options(SearchOptions):
        """Options of ``timestep-groups``; those of the search are `SearchOptions`.

        Attributes:
            method: ``"dp"`` (optimal), ``"search"`` or ``"uniform"``.
            power: p of the error norm of the dynamic program.
        """

        method: Literal["dp", "search", "uniform"] = "dp"
        power: float = Field(2.0, gt=0)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Choose the groups."""
        o = self.options
        timesteps, bounds = context.calibration.timesteps, context.calibration.timestep_range
        bits = activation_bits(plan, context)
        if o.method == "uniform" or not bits:
            plan.groups[DEFAULT_GROUPS] = uniform_groups(timesteps, o.groups, bounds=bounds)
            yield Progress(1, 1)
            return
        yield Progress(0, 2, "activation statistics")
        tables = error_tables(context, bits, symmetric=context.targets.symmetric_acts, power=o.power)
        yield Progress(1, 2, "dynamic program")
        # layers of the finite temporal block count as well: another pass may or may not take them over
        grouping = optimal_groups(tables, timesteps, bounds=bounds)
        plan.sections[self.name] = Section.of(_curve(grouping, o.groups))
        if o.method == "search":
            yield from self._search(plan, context, bits, tables)
        elif o.shared:
            plan.groups[DEFAULT_GROUPS] = grouping.groups(o.groups)
        else:
            for name, table in tables.items():
                plan.groups[name] = optimal_groups({name: table}, timesteps, bounds=bounds).groups(o.groups)
        yield Progress(2, 2)

    @classmethod
    def figure(cls, plan: QuantPlan) -> tuple[Figure, str] | None:
        """The least error for every number of groups, unless the groups were given."""
        section = plan.sections.get(cls.name)
        if section is None:
            return None
        found = section.read(GroupCurve, cls.name)
        curve = (found.groups, found.relative_error)
        y_label = "activation error / power, summed over layers"
        figure = lines({"error": curve}, "number of timestep groups G", y_label)
        return figure, "What one more group buys: the least activation error for every number of groups."

    def _search(
        self, plan: QuantPlan, context: PassContext, bits: dict[str, int], tables: Tables
    ) -> Iterator[Progress]:
        calibration = context.calibration
        found = yield from GroupSearch(plan, context, bits, tables, self.options).run()
        curve = plan.sections[self.name].read(GroupCurve, self.name)
        plan.sections[self.name] = Section.of(replace(curve, search=found.report))
        for name, labels in found.labels.items():
            plan.groups[name], rows = as_runs(labels, calibration.timesteps, calibration.timestep_range)
            if len(set(rows)) < len(rows):
                plan.shared_rows[name] = rows
            for layer in found.ranges.keys() & (set(bits) if self.options.shared else {name}):
                low, high = (end[list(rows)] for end in found.ranges[layer])
                quant = affine_parameters(low, high, bits[layer], symmetric=context.targets.symmetric_acts)
                plan.layers[layer].activation = ActivationQuant(bits[layer], name, *(each.cpu() for each in quant))
        plan.learned_ranges |= frozenset(found.ranges)


def _curve(grouping: Grouping, groups: int) -> GroupCurve:
    static, grouped, each = (grouping.errors(g) for g in (1, groups, len(grouping.timesteps)))
    of_layers = {
        name: {"static": static[name], "grouped": grouped[name], "per_timestep": each[name]} for name in static
    }
    return GroupCurve(tuple(range(1, len(grouping.curve) + 1)), tuple(grouping.curve), of_layers)
