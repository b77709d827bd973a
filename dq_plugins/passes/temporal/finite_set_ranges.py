"""Pass ``finite-set-ranges``: one activation range per timestep of the schedule for the temporal block.

The block sees finitely many inputs, one per timestep, so each gets its exact range: no statistics, no sharing. Layers
that mix t with conditions can get, for each timestep, the range over the recorded conditions. By
default the ranges are those of the block with its planned (quantized) weights, which is what will run.

Source: TFMQ-DM (Huang et al. 2024), finite set calibration. Plain min-max, because the set is finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from dq_plugins.affine import affine_parameters
from dq_plugins.errors import CalibrationError
from dq_plugins.passes.temporal.block import TemporalBlock, shared_block
from dq_plugins.passes.temporal.finite_set import FiniteSet, shared_points
from dq_plugins.plan import ActivationQuant, QuantPlan, Section
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.timesteps import TimestepGroups

GROUPS = "per-timestep"


def exact_ranges(block: TemporalBlock, points: FiniteSet, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Exact input range of every layer of the block at every timestep.

    Args:
        block: the temporal block.
        points: T timesteps, each with all conditions.
        weights: weights by parameter name that replace full-precision ones.

    Returns:
        ``[T, 2]`` by layer: minimum and maximum.
    """
    values = block.run(points.inputs, weights)
    ranges = {}
    for layer, nodes in block.layer_inputs.items():
        rows = torch.cat([points.by_timestep(values[node]) for node in nodes], dim=1)
        ranges[layer] = torch.stack([rows.amin(1), rows.amax(1)], dim=1)
    return ranges


class FiniteSetRanges(Pass):
    """Give the temporal block one exact range for every timestep."""

    name = "finite-set-ranges"
    requires = ("weight-ranges",)
    after = ("temporal-reconstruction", "activation-ranges", "timestep-reduction")

    class Options(PassOptions):
        """Options of ``finite-set-ranges``.

        Attributes:
            quantized_weights: measure the block with its planned weights instead of the full-precision ones.
            conditions: distinct recorded conditions, at most, over which layers that mix t with conditions are
                ranged; 0 leaves those layers to ``activation-ranges``.
        """

        quantized_weights: bool = True
        conditions: int = Field(0, ge=0)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Write the groups ``per-timestep`` and the activation quantizers of the temporal layers."""
        block = shared_block(context, with_conditions=self.options.conditions > 0)
        bits = context.targets.act_bits
        if block is None or bits is None:
            reason = "activations stay in floating point" if block else "no layer depends on the timestep alone"
            plan.sections[self.name] = Section({"skipped": reason})
            return
        timesteps = plan.visited.sorted
        low, high = context.calibration.timestep_range
        plan.groups[GROUPS] = TimestepGroups.one_per_timestep(timesteps, low=low, high=high)
        weights = block.planned_weights(plan) if self.options.quantized_weights else {}
        points = shared_points(context, block, timesteps, self.options.conditions)
        ranges = exact_ranges(block, points, weights)
        for done, (name, bounds) in enumerate(sorted(ranges.items())):
            if not bool(torch.isfinite(bounds).all()):
                t = timesteps[int((~torch.isfinite(bounds).all(1)).nonzero()[0])]
                raise CalibrationError(f"the input of temporal layer {name!r} is not finite at timestep {t:g}")
            scale, zero_point = affine_parameters(
                bounds[:, 0], bounds[:, 1], bits, symmetric=context.targets.symmetric_acts
            )
            layer = plan.layers[name]
            if layer.weight is None:
                continue  # another pass keeps it in full precision, and says why
            layer.activation = ActivationQuant(bits, GROUPS, scale.cpu(), zero_point.cpu())
            layer.unquantized_reason = None
            yield Progress(done + 1, len(ranges), name)
