"""Pass ``exempt-layers``: which layers stay in full precision, by what that does to the denoiser's output.

Rules that others use leave the first and the last layer out, because they see and make the image itself. Here each is
tried, and with them those few that harm the denoiser's output most (`dq_plugins.passes.allocation.harm`): recorded
calls are repeated with the whole plan, with the plan but for all of them, and where that gains enough, but for each in
turn. A layer stays in full precision when that takes away enough of the output's error for what it costs in bytes and
in time; the more it takes away, the more it may cost.

Attentions that the plan quantizes are among those that harm may be found in. Floating point costs one no byte, but the
speed of its products.

It comes before whatever is learned or measured against errors (`block-reconstruction`, `bias-correction`,
`learned-ranges`): that would make up for errors of layers that are in full precision after all.

Why not the final images: a difference in one of them is mostly chance. On the bundled DiT the gain of the first layer,
measured on one image, lay between -0.14 and 0.39 where 32 images say 0.27; on eight calls it is known to 0.05.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, ClassVar

from pydantic import Field

from dq_plugins.passes.allocation.harm import harm, output_error
from dq_plugins.passes.allocation.problem import PROBABILITY_BITS, LayerCost
from dq_plugins.passes.attention import AttentionSize, attention_sizes, quantized_attentions
from dq_plugins.plan import AttentionPlan, LayerPlan, QuantPlan, Reason, Section
from dq_plugins.quantized.attention import attending_module
from dq_plugins.quantized.run import planned_run, planned_states
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.sensitivity.measure import MEASURED

MOST_TIMES = 5


@dataclass(frozen=True)
class Exemption:
    """What one layer in full precision would do.

    Attributes:
        layer: fully qualified name; of an attention, its `site_name`.
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
    after = ("activation-ranges", "attention-ranges", "gptq", "bit-allocation")

    class Options(PassOptions):
        """Options of ``exempt-layers``.

        Attributes:
            roles: layers to try, by role.
            layers: further ones, by name; attentions by the name of the module that attends.
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
        attending = list(quantized_attentions(plan))
        asked += [name for name in attending if attending_module(name) in o.layers]
        calls = list(context.calibration.spread(o.calls, o.samples).calls())
        sizes = attention_sizes(context, attending) if attending else {}
        running = planned_run(context.denoiser, plan, attending, whole=True)
        finished = context.finished(MEASURED, plan, o)
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

            prices = {name: _price(plan, context, sizes, name) for name in asked}
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
                    exempt(plan, name, found.why)
            errors = error(frozenset()), error(kept)
        plan.sections[self.name] = Section.of(ExemptionFindings(errors, tuple(tried)))

    def _worth(self, gain: float | None, price: float) -> bool:
        o = self.options
        if gain is None or gain < o.least_gain / MOST_TIMES:
            return False
        return price <= o.most_cost * min(gain / max(o.least_gain, 1e-6), MOST_TIMES)


def exempt(plan: QuantPlan, name: str, why: str) -> None:
    """Leave a layer or an attention of a plan in full precision, with the figures that say why."""
    reason, module = Reason(f"exempt-layers: {why}", "measured"), attending_module(name)
    if module is not None:
        plan.attention[module] = AttentionPlan(unquantized_reason=reason, rows=plan.attention[module].rows)
        return
    layer = plan.layers[name]
    plan.layers[name] = LayerPlan(layer.kind, layer.roles, unquantized_reason=reason, rows=layer.rows)


def _price(plan: QuantPlan, context: PassContext, sizes: Mapping[str, AttentionSize], name: str) -> tuple[float, float]:
    """Shares that one in full precision adds to the bytes of all weights and to the time of a call."""
    costs = {n: _cost(context, n) for n in plan.layers if n in context.partition.layers}
    costs |= {n: LayerCost(0, size.inputs, size.macs) for n, size in sizes.items()}
    bytes_now = {n: cost.weights * _bits(plan, n)[0] for n, cost in costs.items()}
    time_now = {n: cost.macs * max(_bits(plan, n)) for n, cost in costs.items()}
    full = _full_bits(context, name)
    more_bytes = (costs[name].weights * full - bytes_now[name]) / max(sum(bytes_now.values()), 1)
    more_time = (costs[name].macs * full - time_now[name]) / max(sum(time_now.values()), 1)
    return more_bytes, more_time


def _cost(context: PassContext, name: str) -> LayerCost:
    info = context.partition.layers[name]
    return LayerCost(context.denoiser.get_submodule(name).weight.numel(), 0, info.macs)  # type: ignore[union-attr, operator]


def _full_bits(context: PassContext, name: str) -> int:
    """Bits of a value of a layer's weight; of an attention, of its module's or the denoiser's."""
    module = attending_module(name)
    where = context.denoiser.get_submodule(name if module is None else module)
    weight: Any = where.weight if module is None else next(chain(where.parameters(), context.denoiser.parameters()))
    return 8 * weight.element_size()


def _bits(plan: QuantPlan, name: str) -> tuple[int, int]:
    """Bits of weight and input; 32 in floating point. Of a quantized attention 8, whatever its operands have: the
    probabilities have as many."""
    module = attending_module(name)
    if module is not None:
        return (PROBABILITY_BITS, PROBABILITY_BITS) if plan.attention[module].quantized else (32, 32)
    layer = plan.layers[name]
    return (layer.weight.bits if layer.weight else 32), (layer.activation.bits if layer.activation else 32)
