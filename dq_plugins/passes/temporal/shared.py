"""What the passes of the temporal block share: the block and its points, found once per run."""

from __future__ import annotations

import torch
from torch import Tensor

from dq_plugins.passes.temporal.block import TemporalBlock, temporal_block
from dq_plugins.passes.temporal.finite_set import FiniteSet, finite_set, recorded_conditions
from dq_plugins.plan import QuantPlan
from dq_plugins.recipe import PassContext


def shared_block(
    context: PassContext, *, whole_batch: bool = False, with_conditions: bool = False
) -> TemporalBlock | None:
    """The denoiser's temporal block, found once per run.

    Args:
        context: the run.
        whole_batch: cut it out of a call with as many samples as were recorded, instead of one sample: bit for bit
            what such calls compute, but slower.
        with_conditions: include the layers that mix t with conditions.
    """

    def find() -> TemporalBlock | None:
        call = next(context.calibration.calls())
        one = call if whole_batch else call.rows(torch.tensor([0]), len(call.output))
        argument = context.calibration.timestep_argument
        return temporal_block(context.denoiser, one.kwargs, argument, with_conditions=with_conditions)

    return context.shared(("temporal-block", whole_batch, with_conditions), find)


def shared_points(context: PassContext, block: TemporalBlock, timesteps: tuple[float, ...], most: int) -> FiniteSet:
    """Every timestep with every recorded condition that the block reads, found once per run.

    Args:
        context: the run.
        block: the temporal block.
        timesteps: of the plan's schedule.
        most: conditions at most.
    """

    def find() -> FiniteSet:
        conditions = recorded_conditions(context.calibration, block.conditions, most)
        return finite_set(block, timesteps, conditions)

    return context.shared(("temporal-points", block.conditions, timesteps, most), find)


def planned_weights(block: TemporalBlock, plan: QuantPlan) -> dict[str, Tensor]:
    """The weights that the planned block computes with, by parameter name."""
    weights = block.weights()
    quantized = {}
    for layer in block.layers:
        quant = plan.layers[layer].weight
        if quant is not None:
            quantized[f"{layer}.weight"] = quant.fake_quantize(weights[f"{layer}.weight"])
    return quantized
