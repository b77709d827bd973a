"""Pass ``calibration-timesteps``: how many of the recorded calls at each timestep to calibrate on.

Recorded calls are drawn one by one, each at the timestep where the groups are least decided or least is known, until
the expected gain of another one falls under a threshold. Later passes see only the calls that were drawn.

Source: ADP-DM (Wang et al. 2024), active timestep selection by structural risk minimisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from dq_plugins.errors import RecipeError
from dq_plugins.passes.activations import activation_bits
from dq_plugins.passes.ranges.search.active import ActiveCalibration
from dq_plugins.plan import CalibrationCalls, QuantPlan, Section
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress


class CalibrationTimesteps(Pass):
    """Choose the timesteps and calls that later passes calibrate on."""

    name = "calibration-timesteps"

    class Options(PassOptions):
        """Options of ``calibration-timesteps``.

        Attributes:
            groups: number of groups that timesteps choose between.
            eta: weight of what is unseen (1.5 is the paper's).
            entropy: weight of the entropy in the search beside the drawing.
            threshold: expected gain, in nats, under which drawing stops. With decided groups, a timestep was then drawn
                ``eta / threshold - 1`` times.
            calls: the most calls to draw; None: all that were recorded.
        """

        groups: int = Field(8, ge=1)
        eta: float = Field(1.5, ge=0)
        entropy: float = Field(0.8, ge=0)
        threshold: float = Field(0.25, ge=0)
        calls: int | None = Field(None, ge=1)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Draw, and write the visits."""
        o, calibration = self.options, context.calibration
        bits = activation_bits(plan, context)
        steps, recorded = len(calibration.timesteps), sum(calibration.count(t) for t in calibration.timesteps)
        limit = min(o.calls or recorded, recorded)
        if limit < steps:
            raise RecipeError(
                f"{self.name}: calls={limit} is less than the {steps} recorded timesteps, and each has to be seen "
                "once; allow more calls, or record fewer steps"
            )
        if not bits:
            plan.sections[self.name] = Section({"skipped": "activations stay in floating point"})
            return
        active = ActiveCalibration(
            context.denoiser,
            calibration,
            dict(sorted(bits.items())),
            groups=min(o.groups, steps),
            symmetric=context.targets.symmetric_acts,
            eta=o.eta,
            entropy_weight=o.entropy,
            generator=context.generator(),
            rows=context.row_orders,
        )
        gains: list[float] = []
        for index, gain in active.draw(o.threshold, limit):
            gains.append(gain)
            t = calibration.timesteps[index]
            yield Progress(len(gains), limit, f"timestep {t:g}, expected gain {gain:.2f}")
        stopped = "no call left" if len(gains) == recorded else "limit" if len(gains) == limit else "expected gain"
        plan.calibration_calls = CalibrationCalls(calibration.timesteps, tuple(active.visits.tolist()))
        plan.sections[self.name] = Section(
            {
                "entropy": active.entropy.tolist(),
                "gain": gains,
                "stopped": stopped,
                "recorded": recorded,
            }
        )
