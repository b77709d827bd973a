"""Pass ``step-exceptions``: which of the first and the last steps keep inputs in floating point, or in more bits.

Serving engines keep the first and the last three steps in 16 bits, because one scale fits the outer steps worst
(diffusers#14664, vllm-omni#6560). Here recorded sampling runs are repeated with the plan and one more step at either
end in floating point; the better end gets it, as long as a step takes away enough of the image's error.

The plan then says it by timestep group, and `dq_plugins.plan.step_policy.policy_of` writes it as engines read it. With
``bits`` inputs have more bits there instead: everything stays in integers, dynamic ranges among it.

The last step goes straight into the image, and later steps make up for most of what earlier ones do wrong. So with
narrow inputs it may make nearly all of the image's error, and more bits in one step of 20 cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields
from typing import ClassVar

from pydantic import Field

from dq_plugins.errors import CalibrationError, PlanError
from dq_plugins.passes.image_errors import image_errors, whole_runs
from dq_plugins.passes.width_candidates import activation_candidates
from dq_plugins.plan import InputQuant, QuantPlan, Section
from dq_plugins.plan.step_policy import StepPolicy, with_policy
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.sensitivity.trajectory import Trajectory


@dataclass(frozen=True)
class StepExceptions:
    """What was tried.

    Attributes:
        tried: first steps, last steps, and the mean square error of the final samples.
        first: first steps in floating point, or in more bits.
        last: last ones.
        bits: of their inputs; None: floating point.
        why_not: why nothing was tried; empty where something was.
    """

    tried: tuple[tuple[int, int, float], ...] = ()
    first: int = 0
    last: int = 0
    bits: int | None = None
    why_not: str = ""


class StepExceptionsPass(Pass):
    """Keep inputs in floating point, or in more bits, at the first and last steps."""

    name = "step-exceptions"
    requires = ("activation-ranges",)
    after = ("bias-correction", "group-widths", "learned-ranges", "bit-allocation", "block-reconstruction", "gptq")

    class Options(PassOptions):
        """Options of ``step-exceptions``.

        Attributes:
            most: such steps, at most, both ends together.
            least_gain: share of the plan's image error that each of them must take away.
            runs: recorded sampling runs to repeat.
            bits: of all narrower inputs at these steps; None: floating point, which dynamic ranges do not have.
            where_possible: leave the plan as it is, and say why, where the recording holds no whole sampling runs or a
                run visits a timestep twice; off: refuse.
        """

        most: int = Field(6, ge=0)
        least_gain: float = Field(0.05, ge=0)
        runs: int = Field(2, ge=1)
        bits: int | None = Field(None, ge=2, le=8)
        where_possible: bool = False

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Add a step at a time, at the end where it is worth more."""
        try:
            found = yield from self._search(plan, context)
        except (CalibrationError, PlanError) as error:
            if not self.options.where_possible:
                raise
            found = StepExceptions(bits=self.options.bits, why_not=str(error))
        plan.sections[self.name] = Section.of(found)

    def _search(self, plan: QuantPlan, context: PassContext) -> Generator[Progress, None, StepExceptions]:
        o = self.options
        wide = self._wide(plan, context)
        if wide is not None and not wide:
            return StepExceptions(bits=o.bits, why_not=f"no input has fewer than {o.bits} bits")
        runs = whole_runs(context, o.runs)
        most = min(o.most, len(plan.visited) - 1)
        chosen, start = StepPolicy(), _error(with_policy(plan, StepPolicy(), wide), context, runs)
        tried, best = [(0, 0, start)], start
        for done in range(most):
            yield Progress(done, most, f"image error {best:.3g}")
            ends = (StepPolicy(chosen.first + 1, chosen.last), StepPolicy(chosen.first, chosen.last + 1))
            errors = [_error(with_policy(plan, each, wide), context, runs) for each in ends]
            tried += [(each.first, each.last, error) for each, error in zip(ends, errors, strict=True)]
            least = min(errors)
            if best - least < o.least_gain * start:
                break
            chosen, best = ends[errors.index(least)], least
        if chosen != StepPolicy():
            followed = with_policy(plan, chosen, wide)
            for each in fields(plan):
                setattr(plan, each.name, getattr(followed, each.name))
        yield Progress(most, most)
        return StepExceptions(tuple(tried), chosen.first, chosen.last, o.bits)

    def _wide(self, plan: QuantPlan, context: PassContext) -> dict[str, InputQuant] | None:
        """Quantizers in ``bits`` of the inputs that have fewer in all groups; None: floating point."""
        bits, inputs = self.options.bits, {name: layer.activation for name, layer in plan.layers.items()}
        if bits is None:
            return None
        narrow = [name for name, quant in inputs.items() if quant is not None and quant.bits < bits]
        found = activation_candidates(plan, context, narrow, (bits,)) if narrow else {}
        return {name: found[name][bits] for name in narrow}


def _error(plan: QuantPlan, context: PassContext, runs: list[Trajectory]) -> float:
    return float(image_errors(plan, context, runs).mean())
