"""Pass ``temporal-reconstruction``: learn the rounding of the temporal block against its own features.

    L = sum_i mean_t || g_i(h(t)) - g^_i(h^(t)) ||^2  +  rounding regulariser

over every boundary tensor ``g_i`` of the temporal block and every timestep t of the schedule. Only t is needed: no
forward of the denoiser, no calibration images. All rounding variables of the block are optimised together.

Where a denoiser mixes t with conditions (DiT's modulation: timestep + class), the block can be taken wider: the mean
then goes over every pair of a timestep and a recorded condition.

Source: TFMQ-DM (Huang et al. 2024), temporal-information-aware reconstruction (TIAR). The released code sees every
5th to 25th timestep only, repeated 256 times; here every timestep of the schedule is used, which costs less and is
exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dq_plugins.passes.temporal.block import shared_block
from dq_plugins.passes.temporal.features import feature_error
from dq_plugins.passes.temporal.finite_set import shared_points
from dq_plugins.plan import QuantPlan, Section
from dq_plugins.progress import Progress, reported
from dq_plugins.quantized.learner import Learner, RoundingOptions
from dq_plugins.quantized.soft_rounding import SoftRounding
from dq_plugins.recipe import Pass, PassContext, PassOptions

PRESETS = {
    "default": RoundingOptions(iterations=2000, learning_rate=1e-2, weight=0.01),
    "paper": RoundingOptions(iterations=20_000, learning_rate=1e-3, weight=0.01),
}


class TemporalReconstruction(Pass):
    """Learned rounding of the temporal block."""

    name = "temporal-reconstruction"
    requires = ("weight-ranges",)

    class Options(PassOptions):
        """Options of ``temporal-reconstruction``.

        Attributes:
            preset: ``"default"`` (measured) or ``"paper"`` (20,000 iterations at 1e-3).
            iterations: replaces the preset's.
            learning_rate: replaces the preset's.
            batch: points per iteration; a finite set that is not larger is used whole.
            conditions: distinct recorded conditions, at most, that are paired with every timestep where layers mix
                the two; 0 leaves such layers to the blocks they are in, which is better by measurement
                (`docs/tfmq.md`): a modulation decides less by its own error than by what its block makes of it.
        """

        preset: Literal["default", "paper"] = "default"
        iterations: int | None = Field(None, ge=1)
        learning_rate: float | None = Field(None, gt=0)
        batch: int = Field(64, ge=1)
        conditions: int = Field(0, ge=0)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    @property
    def settings(self) -> RoundingOptions:
        """Settings of the optimisation: the preset, with what the options replace."""
        preset = PRESETS[self.options.preset]
        return RoundingOptions(
            iterations=self.options.iterations or preset.iterations,
            learning_rate=self.options.learning_rate or preset.learning_rate,
            weight=preset.weight,
        )

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Write the learned codes of the temporal layers and the feature errors before and after."""
        block = shared_block(context, with_conditions=self.options.conditions > 0)
        layers = [] if block is None else sorted(n for n in block.layers if _learnable(n, plan, context))
        if block is None or not layers:
            plan.sections[self.name] = Section({"skipped": "no quantized layer depends on the timestep alone"})
            return
        points = shared_points(context, block, plan.visited.sorted, self.options.conditions)
        weights, reference = block.weights(), block.features(points.inputs)
        planned = block.planned_weights(plan)
        before = feature_error(reference, block.features(points.inputs, planned))
        variables = {n: SoftRounding(weights[f"{n}.weight"], plan.layers[n].weight) for n in layers}  # type: ignore[arg-type]

        def loss(soft: dict[str, Tensor], iteration: int) -> Tensor:
            rows = torch.arange(len(points))
            if len(rows) > self.options.batch:
                draw = context.generator(f"iteration {iteration}")
                rows = torch.randperm(len(rows), generator=draw)[: self.options.batch]
            learning = {f"{n}.weight": w for n, w in soft.items()}
            features = block.features(points.rows(rows), {**planned, **learning})
            errors = [(features[k] - reference[k][rows]).square().flatten(1).sum(1).mean() for k in features]
            return torch.stack(errors).sum()

        settings = self.settings
        what = f"{len(layers)} temporal layers"
        result = yield from reported(
            Learner(variables, loss, settings).run(), lambda done: Progress(done, settings.iterations, what)
        )
        for name, codes in result.codes.items():
            quant = plan.layers[name].weight
            assert quant is not None
            quant.codes = codes.cpu()
        after = feature_error(reference, block.features(points.inputs, block.planned_weights(plan)))
        plan.learned_layers |= frozenset(layers)
        plan.sections[self.name] = Section(
            {
                "layers": layers,
                "points": {"timesteps": len(points.timesteps), "conditions": points.conditions},
                "kept_nearest": result.verdict.kept_nearest,
                "before": vars(before),
                "after": vars(after),
            }
        )


def _learnable(name: str, plan: QuantPlan, context: PassContext) -> bool:
    weight = plan.layers[name].weight
    return weight is not None and weight.rounds and not context.partition.layers[name].lookup
