"""Pass ``temporal-reconstruction``: learn the rounding of the temporal block against its own features.

    L = sum_i mean_t || g_i(h(t)) - g^_i(h^(t)) ||^2  +  rounding regulariser

over every frontier tensor ``g_i`` of the temporal block and every timestep t of the schedule. Only t is needed: no
forward of the denoiser, no calibration images. All rounding variables of the block are optimised together.

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

from dq_plugins.plan import QuantPlan, Section
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.rounding import RoundingOptions, SoftRounding, learn_rounding
from dq_plugins.temporal import TemporalBlock, feature_error, temporal_block

PRESETS = {
    "default": RoundingOptions(iterations=2000, learning_rate=1e-2, weight=0.01),
    "paper": RoundingOptions(iterations=20_000, learning_rate=1e-3, weight=0.01),
}


def shared_block(context: PassContext, *, whole_batch: bool = False) -> TemporalBlock | None:
    """The denoiser's temporal block, found once per run.

    Args:
        context: the run.
        whole_batch: cut it out of a call with as many samples as were recorded, instead of one sample: bit for bit
            what such calls compute, but slower.
    """

    def find() -> TemporalBlock | None:
        call = next(context.calibration.calls())
        one = call if whole_batch else call.rows(torch.tensor([0]), len(call.output))
        return temporal_block(context.denoiser, one.kwargs, context.calibration.timestep_argument)

    return context.shared(("temporal-block", whole_batch), find)


def planned_weights(block: TemporalBlock, plan: QuantPlan) -> dict[str, Tensor]:
    """The weights that the planned block computes with, by parameter name."""
    weights = block.weights()
    quantized = {}
    for layer in set(block.layers.values()):
        quant = plan.layers[layer].weight
        if quant is not None:
            quantized[f"{layer}.weight"] = quant.fake(weights[f"{layer}.weight"])
    return quantized


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
            batch: timesteps per iteration; a schedule that is not longer is used whole.
        """

        preset: Literal["default", "paper"] = "default"
        iterations: int | None = Field(None, ge=1)
        learning_rate: float | None = Field(None, gt=0)
        batch: int = Field(64, ge=1)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def _settings(self) -> RoundingOptions:
        preset = PRESETS[self.options.preset]
        return RoundingOptions(
            iterations=self.options.iterations or preset.iterations,
            learning_rate=self.options.learning_rate or preset.learning_rate,
            weight=preset.weight,
        )

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Write the learned codes of the temporal layers and the feature errors before and after."""
        block = shared_block(context)
        layers = [] if block is None else sorted({n for n in block.layers.values() if plan.layers[n].weight})
        if block is None or not layers:
            plan.sections[self.name] = Section({"skipped": "no quantized layer depends on the timestep alone"})
            return
        timesteps = plan.schedule.sorted
        weights, reference = block.weights(), block.features(timesteps)
        before = feature_error(reference, block.features(timesteps, planned_weights(block, plan)))
        variables = {n: SoftRounding(weights[f"{n}.weight"], plan.layers[n].weight) for n in layers}  # type: ignore[arg-type]
        batches = context.generator(len(layers))

        def loss(soft: dict[str, Tensor], _iteration: int) -> Tensor:
            rows = torch.arange(len(timesteps))
            if len(rows) > self.options.batch:
                rows = torch.randperm(len(rows), generator=batches)[: self.options.batch]
            chosen = [timesteps[i] for i in rows.tolist()]
            features = block.features(chosen, {f"{n}.weight": w for n, w in soft.items()})
            errors = [(features[k] - reference[k][rows]).square().flatten(1).sum(1).mean() for k in features]
            return torch.stack(errors).sum()

        settings = self._settings()
        running = learn_rounding(variables, loss, settings)
        while True:
            try:
                yield Progress(next(running), settings.iterations, f"{len(layers)} temporal layers")
            except StopIteration as stop:
                result = stop.value
                break
        for name, codes in result.codes.items():
            quant = plan.layers[name].weight
            assert quant is not None
            quant.codes = codes.cpu()
        after = feature_error(reference, block.features(timesteps, planned_weights(block, plan)))
        plan.sections[self.name] = Section(
            {
                "layers": layers,
                "kept_nearest": result.kept_nearest,
                "before": vars(before),
                "after": vars(after),
            }
        )
