"""Pass ``timestep-groups``: which timesteps share activation ranges.

``dp`` finds the contiguous groups with the least summed quantization error over all layers, exactly; ``uniform`` cuts
the schedule into equally many timesteps and is the baseline. The error curve over the number of groups stays in the
plan, so that a user sees what one more group buys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from dq_plugins.observers.grouping import optimal_groups, uniform_groups
from dq_plugins.passes.activations import DEFAULT_GROUPS, activation_bits, error_tables
from dq_plugins.plan import QuantPlan, Section
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress


class TimestepGrouping(Pass):
    """Write the timestep groups ``default``."""

    name = "timestep-groups"

    class Options(PassOptions):
        """Options of ``timestep-groups``.

        Attributes:
            method: ``"dp"`` (optimal) or ``"uniform"``.
            groups: number of groups; a schedule with fewer timesteps has one each.
            bits: width at which errors are compared; None takes the recipe's target.
            edge_bits: least width of the first and last layers.
            symmetric: zero point 0.
            power: p of the error norm.
        """

        method: Literal["dp", "uniform"] = "dp"
        groups: int = Field(8, ge=1)
        bits: int | None = Field(None, ge=2, le=16)
        edge_bits: int = Field(8, ge=2, le=16)
        symmetric: bool = False
        power: float = Field(2.0, gt=0)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Choose the groups."""
        o = self.options
        timesteps, bounds = context.calibration.timesteps, context.calibration.timestep_range
        bits = activation_bits(plan, context, o.bits, o.edge_bits)
        if o.method == "uniform" or not bits:
            plan.groups[DEFAULT_GROUPS] = uniform_groups(timesteps, o.groups, bounds=bounds)
            yield Progress(1, 1)
            return
        yield Progress(0, 2, "activation statistics")
        tables = error_tables(context, bits, symmetric=o.symmetric, power=o.power)
        yield Progress(1, 2, "dynamic program")
        # layers of the finite temporal block count as well: another pass may or may not take them over
        grouping = optimal_groups(tables, timesteps, bounds=bounds)
        plan.groups[DEFAULT_GROUPS] = grouping.groups(o.groups)
        plan.sections[self.name] = Section(
            {
                "groups": list(range(1, len(grouping.curve) + 1)),
                "relative_error": list(grouping.curve),
                "layer_error": {
                    name: {"static": grouping.errors(1)[name], "grouped": error, "per_timestep": best}
                    for (name, error), best in zip(
                        grouping.errors(o.groups).items(), grouping.errors(len(timesteps)).values(), strict=True
                    )
                },
            }
        )
        yield Progress(2, 2)
