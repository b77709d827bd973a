"""Pass ``exempt-layers``: which layers stay in full precision, by what that does to the denoiser's output.

Rules that others use leave the first and the last layer out, because they see and make the image itself. Here each is
tried, and with them those few that harm the denoiser's output most (`dq_plugins.passes.allocation.harm`): recorded
calls are repeated with the whole plan, with the plan but for all of them, and where that gains enough, but for each in
turn. A layer stays in full precision when that takes away enough of the output's error for what it costs in bytes and
in time; the more it takes away, the more it may cost.

It comes before whatever is learned or measured against errors (`block-reconstruction`, `bias-correction`,
`learned-ranges`): that would make up for errors of layers that are in full precision after all.

Why not the final images: a difference in one of them is mostly chance. On the bundled DiT the gain of the first layer,
measured on one image, lay between -0.14 and 0.39 where 32 images say 0.27; on eight calls it is known to 0.05.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from pydantic import Field

from dq_plugins.passes.allocation.harm import harm, output_error
from dq_plugins.passes.allocation.problem import LayerCost
from dq_plugins.plan import LayerPlan, QuantPlan, Reason, Section
from dq_plugins.quantized.run import planned_run, planned_states
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.sensitivity.measure import MEASURED

MOST_TIMES = 5


@dataclass(frozen=True)
class Exemption:
    """What one layer in full precision would do.

    Attributes:
        layer: fully qualified name.
        gain: share of the error of the denoiser's output that it takes away; negative where it adds some. Where all
            that could be exempt together take too little away, what they take. None: it costs more than any gain is
            worth, so it was not measured.
        bytes: share that it adds to the bytes of all weights.
        time: share that it adds to the time of a call, see `ExemptLayers.Options.most_cost`.
        exempt: whether it stays in full precision.
    """

    layer: str
    gain: float | None
    bytes: float
    time: float
    exempt: bool

    @property
    def why(self) -> str:
        """The figures in words."""
        price = f"{self.bytes:.2%} more bytes and {self.time:.2%} more time"
        if self.gain is None:
            return f"in full precision it costs more than any gain is worth: {price}"
        share = f"{self.gain:.1%} of" if self.gain > 0 else "none of"
        return f"in full precision it takes {share} the output's error away, for {price}"


@dataclass(frozen=True)
class ExemptionFindings:
    """What the pass tried.

    Attributes:
        error: squared error of the denoiser's output over its power, before and after the pass.
        tried: every layer that was tried, in order.
    """

    error: tuple[float, float]
    tried: tuple[Exemption, ...]


class ExemptLayers(Pass):
    """Keep layers in full precision whose error is not worth what they save."""

    name = "exempt-layers"
    requires = ("weight-ranges",)
    after = ("activation-ranges", "gptq", "bit-allocation")

    class Options(PassOptions):
        """Options of ``exempt-layers``.

        Attributes:
            roles: layers to try, by role.
            layers: further ones, by name.
            worst: further ones, so many at most: each makes a share of ``least_gain`` of the error that worse ones
                leave in the denoiser's output.
            calls: recorded calls to repeat, spread evenly over the recording.
            samples: of these calls together.
            least_gain: share of the output's error that a layer of ``most_cost`` must take away; a cheaper one must
                take away as much less, down to a fifth.
            most_cost: share that a layer with the least gain may add to the bytes of all weights, and to the time of a
                call; one with n times the gain may add n times as much, up to five. Time is counted as
                multiply-accumulate operations times the bits of the wider operand: what a kernel of this width takes.
        """

        roles: tuple[str, ...] = ("first", "last")
        layers: tuple[str, ...] = ()
        worst: int = Field(8, ge=0)
        calls: int = Field(8, ge=1)
        samples: int = Field(8, ge=1)
        least_gain: float = Field(0.1, ge=0, le=1)
        most_cost: float = Field(0.02, ge=0)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Try one layer after the other; each sees the plan that those before it left.

        A layer that was tried is not tried again after an interruption.
        """
        o = self.options
        asked = [n for n, p in plan.layers.items() if p.quantized and (n in o.layers or p.roles & set(o.roles))]
        asked.sort(key=lambda name: "last" not in plan.layers[name].roles)  # then what all gain answers for the others
        calls = list(context.calibration.spread(o.calls, o.samples).calls())
        running, finished = planned_run(context.denoiser, plan, whole=True), context.finished(MEASURED, plan, o)
        tried, kept = [], frozenset[str]()
        with running:
            running.use({})
            states = planned_states(running, plan, spare_memory=True)
            harmful = harm(running, states, context.calibration, o.worst, o.least_gain)
            # of these most harm is known: behind it that of others cannot be seen
            asked = [*harmful, *(name for name in asked if name not in harmful)]

            @cache
            def error(exempt: frozenset[str]) -> float:
                unit = f"without {' '.join(sorted(exempt))}" if exempt else "the whole plan"
                sums = finished.find(unit)
                if sums is None:
                    left = {n: state for n, state in states.items() if n not in exempt}
                    sums = {"error": output_error(running, left, calls)}
                    finished.keep(unit, sums)
                return sums["error"]

            def gain(exempt: frozenset[str]) -> float:
                return 1 - error(exempt) / error(kept) if error(kept) > 0 else 0.0

            prices = {name: self._price(plan, context, name) for name in asked}
            possible = frozenset(n for n, price in prices.items() if max(price) <= o.most_cost * MOST_TIMES)
            for done, name in enumerate(asked):
                yield Progress(done, len(asked), name)
                # what all of them gain together, beyond those that are kept, no one of them can exceed
                won = gain(possible | kept) if name in possible else None
                if self._worth(won, max(prices[name])):
                    won = gain(kept | {name})
                found = Exemption(name, won, *prices[name], exempt=self._worth(won, max(prices[name])))
                tried.append(found)
                if found.exempt:
                    kept |= {name}
                    plan.layers[name] = exempted(plan.layers[name], found.why)
            errors = error(frozenset()), error(kept)
        plan.sections[self.name] = Section.of(ExemptionFindings(errors, tuple(tried)))

    def _price(self, plan: QuantPlan, context: PassContext, name: str) -> tuple[float, float]:
        """Shares that a layer in full precision adds to the bytes of all weights and to the time of a call."""
        costs = {n: _cost(context, n) for n in plan.layers if n in context.partition.layers}
        bytes_now = {n: cost.weights * _bits(plan.layers[n])[0] for n, cost in costs.items()}
        time_now = {n: cost.macs * max(_bits(plan.layers[n])) for n, cost in costs.items()}
        full = 8 * context.denoiser.get_submodule(name).weight.element_size()  # type: ignore[union-attr, operator]
        more_bytes = (costs[name].weights * full - bytes_now[name]) / max(sum(bytes_now.values()), 1)
        more_time = (costs[name].macs * full - time_now[name]) / max(sum(time_now.values()), 1)
        return more_bytes, more_time

    def _worth(self, gain: float | None, price: float) -> bool:
        o = self.options
        if gain is None or gain < o.least_gain / MOST_TIMES:
            return False
        return price <= o.most_cost * min(gain / max(o.least_gain, 1e-6), MOST_TIMES)


def exempted(layer: LayerPlan, why: str) -> LayerPlan:
    """The plan of a layer that stays in full precision, with the figures that say why."""
    reason = Reason(f"exempt-layers: {why}", "measured")
    return LayerPlan(layer.kind, layer.roles, unquantized_reason=reason, rows=layer.rows)


def _cost(context: PassContext, name: str) -> LayerCost:
    info = context.partition.layers[name]
    return LayerCost(context.denoiser.get_submodule(name).weight.numel(), 0, info.macs)  # type: ignore[union-attr, operator]


def _bits(layer: LayerPlan) -> tuple[int, int]:
    """Bits of weight and input; 32 in floating point."""
    return (layer.weight.bits if layer.weight else 32), (layer.activation.bits if layer.activation else 32)
