"""Pass ``exempt-layers``: which layers stay in full precision, by what that does to the final image.

Rules that others use leave the first and the last layer out, because they see and make the image itself. Here each is
tried: recorded sampling runs are repeated with the whole plan, and with the plan but for this layer. It stays in full
precision when that takes away enough of the image's error for what it costs in bytes and in time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from dq_plugins.errors import CalibrationError
from dq_plugins.passes.allocation.problem import LayerCost
from dq_plugins.plan import LayerPlan, QuantPlan, Reason, Section
from dq_plugins.quantized.run import planned_run, planned_states
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.sensitivity.exact_noise import replayed_error
from dq_plugins.sensitivity.measure import MEASURED
from dq_plugins.sensitivity.trajectory import trajectories_of


@dataclass(frozen=True)
class Exemption:
    """What one layer in full precision would do.

    Attributes:
        layer: fully qualified name.
        gain: share of the plan's image error that it takes away; negative where it adds some.
        bytes: share that it adds to the bytes of all weights.
        time: share that it adds to the time of a call, see `ExemptLayers.Options.most_cost`.
        exempt: whether it stays in full precision.
    """

    layer: str
    gain: float
    bytes: float
    time: float
    exempt: bool

    @property
    def why(self) -> str:
        """The figures in words."""
        share = f"{self.gain:.1%} of" if self.gain > 0 else "none of"
        taken = f"takes {share} the image's error away"
        return f"in full precision it {taken}, for {self.bytes:.2%} more bytes and {self.time:.2%} more time"


@dataclass(frozen=True)
class ExemptionFindings:
    """What the pass tried.

    Attributes:
        error: mean square error of the final samples, before and after the pass; None: there was no run to repeat.
        tried: every layer that was tried, in order.
    """

    error: tuple[float, float] | None
    tried: tuple[Exemption, ...]


class ExemptLayers(Pass):
    """Take the quantizers off layers whose error is not worth what they save."""

    name = "exempt-layers"
    requires = ("weight-ranges",)
    after = ("activation-ranges", "bias-correction", "block-reconstruction", "gptq", "bit-allocation", "learned-ranges")

    class Options(PassOptions):
        """Options of ``exempt-layers``.

        Attributes:
            roles: layers to try, by role.
            layers: further ones, by name.
            runs: recorded sampling runs to repeat.
            optional: leave all layers as they are where the recording holds no whole run; the section says so.
            least_gain: share of the image's error that a layer must take away.
            most_cost: share that it may add to the bytes of all weights, and to the time of a call. Time is counted as
                multiply-accumulate operations times the bits of the wider operand: what a kernel of this width takes.
        """

        roles: tuple[str, ...] = ("first", "last")
        layers: tuple[str, ...] = ()
        runs: int = Field(2, ge=1)
        optional: bool = False
        least_gain: float = Field(0.1, ge=0, le=1)
        most_cost: float = Field(0.02, ge=0)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Try one layer after the other; each sees the plan that those before it left.

        A layer that was tried is not tried again after an interruption.

        Raises:
            CalibrationError: the recording holds no whole sampling run, and the pass is not optional.
        """
        o = self.options
        asked = [n for n, p in plan.layers.items() if p.quantized and (n in o.layers or p.roles & set(o.roles))]
        try:
            runs = trajectories_of(context.calibration, context.partition.sample_argument)[: o.runs]
        except CalibrationError:
            if not o.optional:
                raise
            plan.sections[self.name] = Section.of(ExemptionFindings(None, ()))
            return
        running, kept = planned_run(context.denoiser, plan, whole=True), context.finished(MEASURED, plan, o)

        def error_of(unit: str) -> float:
            sums = kept.find(unit) or {"error": replayed_error(context.denoiser, runs)}
            kept.keep(unit, sums)
            return sums["error"]

        tried = []
        with running:
            running.use({})
            states = planned_states(running, plan)
            running.use(states)
            first = error = error_of("the whole plan")
            for done, name in enumerate(asked):
                yield Progress(done, len(asked), name)
                without = {n: state for n, state in states.items() if n != name}
                running.use(without)
                left = error_of(f"without {name}")
                found = self._judged(plan, context, name, 1 - left / error if error > 0 else 0.0)
                tried.append(found)
                if found.exempt:
                    states, error = without, left
                    plan.layers[name] = exempted(plan.layers[name], found.why)
        plan.sections[self.name] = Section.of(ExemptionFindings((first, error), tuple(tried)))

    def _judged(self, plan: QuantPlan, context: PassContext, name: str, gain: float) -> Exemption:
        costs = {n: _cost(context, n) for n in plan.layers if n in context.partition.layers}
        bytes_now = {n: cost.weights * _bits(plan.layers[n])[0] for n, cost in costs.items()}
        time_now = {n: cost.macs * max(_bits(plan.layers[n])) for n, cost in costs.items()}
        full = 8 * context.denoiser.get_submodule(name).weight.element_size()  # type: ignore[union-attr, operator]
        more_bytes = (costs[name].weights * full - bytes_now[name]) / max(sum(bytes_now.values()), 1)
        more_time = (costs[name].macs * full - time_now[name]) / max(sum(time_now.values()), 1)
        exempt = gain >= self.options.least_gain and max(more_bytes, more_time) <= self.options.most_cost
        return Exemption(name, gain, more_bytes, more_time, exempt)


def exempted(layer: LayerPlan, why: str) -> LayerPlan:
    """The plan of a layer that stays in full precision, with the figures that say why."""
    return LayerPlan(layer.kind, layer.roles, unquantized_reason=Reason(f"exempt-layers: {why}", "measured"))


def _cost(context: PassContext, name: str) -> LayerCost:
    info = context.partition.layers[name]
    return LayerCost(context.denoiser.get_submodule(name).weight.numel(), 0, info.macs)  # type: ignore[union-attr, operator]


def _bits(layer: LayerPlan) -> tuple[int, int]:
    """Bits of weight and input; 32 in floating point."""
    return (layer.weight.bits if layer.weight else 32), (layer.activation.bits if layer.activation else 32)
