"""Pass ``temporal-reconstruction``: learn the rounding of the temporal block against its own features.

    L = sum_i mean_t || g_i(h(t)) - g^_i(h^(t)) ||^2

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
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dq_plugins.passes.temporal.block import shared_block
from dq_plugins.passes.temporal.features import feature_error
from dq_plugins.passes.temporal.finite_set import shared_points
from dq_plugins.plan import QuantPlan, Section
from dq_plugins.progress import Progress, reported
from dq_plugins.quantized.learner import Learner
from dq_plugins.quantized.offset_rounding import SignSteps
from dq_plugins.quantized.resuming import STATE, resumable
from dq_plugins.quantized.rounding_variables import RoundingMethod
from dq_plugins.quantized.soft_rounding import AdaRound
from dq_plugins.recipe import Pass, PassContext, PassOptions

PRESETS: dict[str, RoundingMethod] = {
    "default": AdaRound(iterations=2000, learning_rate=1e-2, weight=0.01),
    "sign": SignSteps(iterations=100, learning_rate=5e-3),
    "paper": AdaRound(iterations=20_000, learning_rate=1e-3, weight=0.01),
}


class TemporalReconstruction(Pass):
    """Learn the rounding of the temporal block from the timesteps alone."""

    name = "temporal-reconstruction"
    requires = ("weight-ranges",)

    class Options(PassOptions):
        """Options of ``temporal-reconstruction``.

        Attributes:
            preset: ``"default"`` (AdaRound, 2000 iterations at 1e-2), ``"paper"`` (20,000 at 1e-3) or ``"sign"`` (100
                sign steps: best where time is short, but more of them do not help, because every iteration sees the
                whole finite set, and the relaxation then finds more by measurement, `docs/tfmq.md`).
            iterations: replaces the preset's.
            learning_rate: replaces the preset's.
            batch: points per iteration; a finite set that is not larger is used whole.
            conditions: distinct recorded conditions, at most, that are paired with every timestep where layers mix
                the two; 0 leaves such layers to the blocks they are in, which is better by measurement
                (`docs/tfmq.md`): a modulation decides less by its own error than by what its block makes of it.
        """

        preset: Literal["default", "sign", "paper"] = "default"
        iterations: int | None = Field(None, ge=1)
        learning_rate: float | None = Field(None, gt=0)
        batch: int = Field(64, ge=1)
        conditions: int = Field(0, ge=0)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    @property
    def method(self) -> RoundingMethod:
        """How rounding is learned: the preset, with what the options replace."""
        given = {"iterations": self.options.iterations, "learning_rate": self.options.learning_rate}
        return replace(PRESETS[self.options.preset], **{k: v for k, v in given.items() if v is not None})

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
        method = self.method
        variables = {n: method.variables(weights[f"{n}.weight"], plan.layers[n].weight) for n in layers}  # type: ignore[arg-type]

        def error(rounded: dict[str, Tensor], rows: Tensor) -> Tensor:
            learning = {f"{n}.weight": w for n, w in rounded.items()}
            features = block.features(points.rows(rows), {**planned, **learning})
            errors = [(features[k] - reference[k][rows]).square().flatten(1).sum(1).mean() for k in features]
            return torch.stack(errors).sum()

        def loss(rounded: dict[str, Tensor], iteration: int) -> Tensor:
            rows = torch.arange(len(points))
            if len(rows) > self.options.batch:
                draw = context.generator(f"iteration {iteration}")
                rows = torch.randperm(len(rows), generator=draw)[: self.options.batch]
            return error(rounded, rows)

        chunks = torch.arange(len(points)).split(self.options.batch)
        what = f"{len(layers)} temporal layers"
        kept = context.finished(STATE, plan, self.options)
        learner = Learner(variables, loss, method, judge=lambda w, i: error(w, chunks[i]), probes=len(chunks))
        result = yield from reported(
            resumable(learner, kept, what), lambda done: Progress(done, method.iterations, what)
        )
        for name, codes in result.decided.items():
            quant = plan.layers[name].weight
            assert quant is not None
            quant.codes = codes.cpu()
        after = feature_error(reference, block.features(points.inputs, block.planned_weights(plan)))
        plan.learned_layers |= frozenset(layers)
        plan.sections[self.name] = Section(
            {
                "layers": layers,
                "points": {"timesteps": len(points.timesteps), "conditions": points.conditions},
                "kept_start": result.verdict.kept_start,
                "before": vars(before),
                "after": vars(after),
            }
        )


def _learnable(name: str, plan: QuantPlan, context: PassContext) -> bool:
    weight = plan.layers[name].weight
    return weight is not None and weight.rounds and not context.partition.layers[name].lookup
