"""Pass ``exempt-layers``: which layers stay in full precision, by what that does to the denoiser's output.

Rules that others use leave the first and the last layer out, because they see and make the image itself. Here each is
tried, and with them those few that harm the denoiser's output most (`dq_plugins.passes.allocation.harm`): recorded
calls are repeated with the whole plan, with the plan but for all of them, and where that gains enough, but for each in
turn. A layer stays in full precision when that takes away enough of the output's error for what it costs in bytes and
in time; the more it takes away, the more it may cost.

A layer whose input has fewer than 8 bits, in any timestep group, is first tried with 8, which costs no byte: often it
is the input alone that does the harm, as in the shortcuts of a U-Net.

Attentions that the plan quantizes are among those that harm may be found in. Floating point costs one no byte, but the
speed of its products.

It comes before whatever is learned or measured against errors (`block-reconstruction`, `bias-correction`,
`learned-ranges`): that would make up for errors of layers that are in full precision after all.

Why not the final images: a difference in one of them is mostly chance. On the bundled DiT the gain of the first layer,
measured on one image, lay between -0.14 and 0.39 where 32 images say 0.27; on eight calls it is known to 0.05.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar

from pydantic import Field

from dq_plugins.artifact import UnitResults
from dq_plugins.calibration import Call
from dq_plugins.passes.allocation.harm import harm, output_error
from dq_plugins.passes.allocation.problem import LayerCost
from dq_plugins.passes.attention import AttentionSize, attention_sizes, quantized_attentions
from dq_plugins.passes.width_candidates import activation_candidates
from dq_plugins.plan import AttentionPlan, LayerPlan, QuantPlan, Reason, Section
from dq_plugins.quantized.attention import PROBABILITY_BITS, attending_module
from dq_plugins.quantized.run import WIDE, QuantizedRun, States, narrow_inputs, planned_run, planned_states
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.sensitivity.measure import MEASURED, Sums

MOST_TIMES = 5
Change = tuple[str, bool]
"""A layer or an attention, and whether its input alone is changed."""


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
        input_alone: of an input of `WIDE` bits instead of full precision.
    """

    layer: str
    gain: float | None
    bytes: float
    time: float
    exempt: bool
    input_alone: bool = False

    @property
    def why(self) -> str:
        """The figures in words."""
        form = f"with an input of {WIDE} bits" if self.input_alone else "in full precision"
        price = f"{self.bytes:.2%} more bytes and {self.time:.2%} more time"
        if self.gain is None:
            return f"{form} it costs more than any gain is worth: {price}"
        share = f"{self.gain:.1%} of" if self.gain > 0 else "none of"
        return f"{form} it takes {share} the output's error away, for {price}"


@dataclass(frozen=True)
class ExemptionFindings:
    """What the pass tried.

    Attributes:
        error: squared error of the denoiser's output over its power, before and after the pass.
        tried: everything that was tried, in order.
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
                leave in the denoiser's output; a fifth of it where inputs have fewer than 8 bits.
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
        tried, kept = [], frozenset[Change]()
        with running:
            running.use({})
            states = planned_states(running, plan, spare_memory=True)
            # what is wider alone costs next to nothing, so it may gain less
            least = o.least_gain / MOST_TIMES if narrow_inputs(plan) else o.least_gain
            harmful = harm(running, states, context.calibration, o.worst, least)
            # of these most harm is known: behind it that of others cannot be seen
            asked = [*harmful, *(name for name in asked if name not in harmful)]
            running.use({})  # what is made now is of full precision
            wider = _with_wide_inputs(plan, context, asked)
            wide = planned_states(running, replace(plan, layers={**plan.layers, **wider}), wider)
            errors = _Errors(running, states, wide, calls, context.finished(MEASURED, plan, o))
            changes: list[Change] = [(n, alone) for n in asked for alone in ((True, False) if n in wider else (False,))]
            prices = {change: _price(plan, context, sizes, *change) for change in changes}
            possible = frozenset(c for c, price in prices.items() if max(price) <= o.most_cost * MOST_TIMES)
            for done, change in enumerate(changes):
                name, input_alone = change
                yield Progress(done, len(changes), name)
                if (name, True) in kept:
                    continue
                # what all of them gain together, beyond those that are kept, no one of them can exceed
                won = errors.gain(kept, possible) if change in possible else None
                if self._worth(won, max(prices[change])):
                    won = errors.gain(kept, {change})
                worth = self._worth(won, max(prices[change]))
                found = Exemption(name, won, *prices[change], exempt=worth, input_alone=input_alone)
                tried.append(found)
                if not found.exempt:
                    continue
                kept |= {change}
                if input_alone:
                    plan.layers[name].activation = wider[name].activation
                else:
                    exempt(plan, name, found.why)
            before_and_after = errors.of(frozenset()), errors.of(kept)
        plan.sections[self.name] = Section.of(ExemptionFindings(before_and_after, tuple(tried)))

    def _worth(self, gain: float | None, price: float) -> bool:
        o = self.options
        if gain is None or gain < o.least_gain / MOST_TIMES:
            return False
        return price <= o.most_cost * min(gain / max(o.least_gain, 1e-6), MOST_TIMES)


class _Errors:
    """Errors of the denoiser's output with some changes, each measured once, an interrupted run included."""

    def __init__(
        self, run: QuantizedRun, states: States, wide: States, calls: Sequence[Call], finished: UnitResults[Sums]
    ) -> None:
        self.run, self.states, self.wide, self.calls, self.finished = run, states, wide, calls, finished
        self.known: dict[frozenset[Change], float] = {}

    def of(self, chosen: frozenset[Change]) -> float:
        """Squared error over power."""
        if chosen not in self.known:
            self.known[chosen] = self._found(chosen)
        return self.known[chosen]

    def _found(self, chosen: frozenset[Change]) -> float:
        names = [f"the input of {n}" if input_alone else n for n, input_alone in sorted(chosen)]
        unit = f"without {' '.join(names)}" if names else "the whole plan"
        sums = self.finished.find(unit)
        if sums is None:
            left = {n: state for n, state in self.states.items() if (n, False) not in chosen}
            left |= {n: self.wide[n] for n, input_alone in chosen if input_alone and n in left}
            sums = {"error": output_error(self.run, left, self.calls)}
            self.finished.keep(unit, sums)
        return sums["error"]

    def gain(self, kept: frozenset[Change], more: Iterable[Change]) -> float:
        """The share of the error beside some changes that more of them take away."""
        before = self.of(kept)
        return 1 - self.of(kept.union(more)) / before if before > 0 else 0.0


def exempt(plan: QuantPlan, name: str, why: str) -> None:
    """Leave a layer or an attention of a plan in full precision, with the figures that say why."""
    reason, module = Reason(f"exempt-layers: {why}", "measured"), attending_module(name)
    if module is not None:
        plan.attention[module] = AttentionPlan(unquantized_reason=reason, rows=plan.attention[module].rows)
        return
    layer = plan.layers[name]
    plan.layers[name] = LayerPlan(layer.kind, layer.roles, unquantized_reason=reason, rows=layer.rows)


def _with_wide_inputs(plan: QuantPlan, context: PassContext, names: Sequence[str]) -> dict[str, LayerPlan]:
    """The layers among them whose inputs have fewer than `WIDE` bits at some timesteps, with so many at all."""
    narrow_ones = set(narrow_inputs(plan))
    narrow = [name for name in names if name in narrow_ones]
    found = activation_candidates(plan, context, narrow, (WIDE,)) if narrow else {}
    return {name: replace(plan.layers[name], activation=found[name][WIDE]) for name in narrow}


def _price(
    plan: QuantPlan, context: PassContext, sizes: Mapping[str, AttentionSize], name: str, input_alone: bool
) -> tuple[float, float]:
    """Shares that one in full precision, or its input in `WIDE` bits, adds to the bytes of all weights and to the time
    of a call."""
    costs = {n: _cost(context, n) for n in plan.layers if n in context.partition.layers}
    costs |= {n: LayerCost(0, size.inputs, size.macs) for n, size in sizes.items()}
    bytes_now = {n: cost.weights * _bits(plan, n)[0] for n, cost in costs.items()}
    time_now = {n: cost.macs * max(_bits(plan, n)) for n, cost in costs.items()}
    if input_alone:
        wider = max(*_bits(plan, name), WIDE) - max(_bits(plan, name))
        return 0.0, costs[name].macs * wider / max(sum(time_now.values()), 1)
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
