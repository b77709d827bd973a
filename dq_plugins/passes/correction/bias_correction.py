"""Pass ``bias-correction``: take away the mean error of each layer's output, by timestep group and output channel.

An error that is the same at every step adds up over a sampling run, where random ones average out; and a correction
costs nothing at run time, because it is added to the bias with which the layer ends anyway.

Source: see `dq_plugins.passes.correction.mean_error`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from dq_plugins.passes.activations import group_names
from dq_plugins.passes.correction.mean_error import MeanErrors, output_means
from dq_plugins.plan import ActivationQuant, BiasCorrection, QuantPlan
from dq_plugins.quantized.run import planned_run, planned_states
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.timesteps import TimestepGroups


class BiasCorrecting(Pass):
    """Take the mean error off every layer's output, by timestep group and channel."""

    name = "bias-correction"
    requires = ("weight-ranges",)
    after = (
        "weight-group-sizes",
        "activation-ranges",
        "attention-ranges",
        "group-widths",
        "block-reconstruction",
        "exempt-layers",
        "finite-set-ranges",
        "gptq",
        "temporal-reconstruction",
        "temporal-table",
    )

    class Options(PassOptions):
        """Options of ``bias-correction``.

        Attributes:
            calls: recorded calls to measure on, spread evenly over the recording.
            samples: of these calls together.
            groups: a correction for each timestep group; off: one for all, which is part of the bias.
        """

        calls: int = Field(24, ge=1)
        samples: int = Field(48, ge=1)
        groups: bool = True

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Measure in one sweep, then write the tables."""
        names = self._groups(plan, context)
        for layer in names:
            plan.layers[layer].bias_correction = None  # an earlier correction is measured anew
        groups = {n: plan.groups[g] if g else TimestepGroups(()) for n, g in names.items()}
        run = planned_run(context.denoiser, plan, whole=True, out_of_range="nearest")
        calls = context.calibration.spread(self.options.calls, self.options.samples)
        states = planned_states(run, plan, spare_memory=True)
        errors = MeanErrors(run, states, groups, output_means(context, calls))
        for done, call in enumerate(calls.calls(), 1):
            errors.see(call)
            yield Progress(done, len(calls), "mean errors")
        for layer, name in names.items():
            plan.layers[layer].bias_correction = BiasCorrection(errors.table(layer), name)

    def _groups(self, plan: QuantPlan, context: PassContext) -> dict[str, str | None]:
        """Name of the timestep groups of each layer to correct; None: one row for all timesteps."""
        return {
            name: _groups_of(plan, name) if self.options.groups else None
            for name, layer in plan.layers.items()
            if layer.quantized and name in context.partition.layers and not context.partition.layers[name].lookup
        }


def _groups_of(plan: QuantPlan, name: str) -> str | None:
    """Those that its ranges have, or would have if they were not dynamic; None for an input in floating point."""
    layer = plan.layers[name]
    if isinstance(layer.activation, ActivationQuant):
        return layer.activation.groups
    groups = group_names(plan, [name])[name]
    return groups if layer.dynamic and groups in plan.groups else None
