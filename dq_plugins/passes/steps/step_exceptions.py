"""Pass ``step-exceptions``: which of the first and the last steps keep inputs in floating point, by measurement.

Serving engines keep the first and the last three steps in 16 bits, because one scale fits the outer steps worst
(diffusers#14664, vllm-omni#6560). Here recorded sampling runs are repeated with the plan and one more step at either
end in floating point; the better end gets it, as long as a step takes away enough of the image's error.

The plan then says it by timestep group, and `dq_plugins.plan.step_policy.policy_of` writes it as engines read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import ClassVar

from pydantic import Field

from dq_plugins.plan import QuantPlan, Section
from dq_plugins.plan.step_policy import StepPolicy, with_policy
from dq_plugins.quantized.run import planned_run, planned_states
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.sensitivity.exact_noise import replayed_error
from dq_plugins.sensitivity.trajectory import Trajectory, trajectories_of


@dataclass(frozen=True)
class StepExceptions:
    """What was tried.

    Attributes:
        tried: first steps, last steps, and the mean square error of the final samples.
        first: first steps in floating point.
        last: last ones.
    """

    tried: tuple[tuple[int, int, float], ...]
    first: int
    last: int


class StepExceptionsPass(Pass):
    """Keep inputs in floating point at the first and last steps."""

    name = "step-exceptions"
    requires = ("activation-ranges",)
    after = ("bias-correction", "group-widths", "learned-ranges", "bit-allocation", "block-reconstruction", "gptq")

    class Options(PassOptions):
        """Options of ``step-exceptions``.

        Attributes:
            most: steps in floating point, at most, both ends together.
            least_gain: share of the plan's image error that each of them must take away.
            runs: recorded sampling runs to repeat.
        """

        most: int = Field(6, ge=0)
        least_gain: float = Field(0.05, ge=0)
        runs: int = Field(2, ge=1)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Add a step at a time, at the end where it is worth more."""
        o = self.options
        runs = trajectories_of(context.calibration, context.partition.sample_argument)[: o.runs]
        most = min(o.most, len(plan.visited) - 1)
        chosen, start = StepPolicy(), _error(plan, StepPolicy(), context, runs)
        tried, best = [(0, 0, start)], start
        for done in range(most):
            yield Progress(done, most, f"image error {best:.3g}")
            ends = (StepPolicy(chosen.first + 1, chosen.last), StepPolicy(chosen.first, chosen.last + 1))
            errors = [_error(plan, each, context, runs) for each in ends]
            tried += [(each.first, each.last, error) for each, error in zip(ends, errors, strict=True)]
            least = min(errors)
            if best - least < o.least_gain * start:
                break
            chosen, best = ends[errors.index(least)], least
        if chosen != StepPolicy():
            followed = with_policy(plan, chosen)
            for each in fields(plan):
                setattr(plan, each.name, getattr(followed, each.name))
        plan.sections[self.name] = Section.of(StepExceptions(tuple(tried), chosen.first, chosen.last))
        yield Progress(most, most)


def _error(plan: QuantPlan, policy: StepPolicy, context: PassContext, runs: list[Trajectory]) -> float:
    """Mean square error of the final samples with a policy."""
    followed = with_policy(plan, policy)
    run = planned_run(context.denoiser, followed, whole=True, out_of_range="nearest")
    states = planned_states(run, followed)
    with run:
        run.use(states)
        return replayed_error(context.denoiser, runs)
