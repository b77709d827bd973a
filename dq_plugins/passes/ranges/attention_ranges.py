"""Pass ``attention-ranges``: the clip ranges of query, key and value of every attention, in every timestep group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from dq_plugins.passes.activations import DEFAULT_GROUPS
from dq_plugins.passes.attention import attention_quantizers, observed, operand_name
from dq_plugins.plan import AttentionPlan, QuantPlan, Reason, Section
from dq_plugins.plan.attention import OPERANDS
from dq_plugins.quantized.attention import attention_calls
from dq_plugins.quantized.sampled import SampledStatistics
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.timesteps import RowOrder, TimestepGroups


class AttentionRanges(Pass):
    """Put the two products of attention in integers: ranges of queries, keys and values."""

    name = "attention-ranges"
    after = ("activation-ranges", "calibration-timesteps", "timestep-groups")

    class Options(PassOptions):
        """Options of ``attention-ranges``.

        Attributes:
            bits: width of query, key and value; the probabilities have 8 bits.
            observer: see ``activation-ranges``.
            power: p of the error norm of ``"mse"``.
            leave: modules whose attention stays in floating point.
        """

        bits: int = Field(8, ge=2, le=8)
        observer: str = "by-width"
        power: float = Field(2.0, gt=0)
        leave: tuple[str, ...] = ()

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Find what attends in one recorded call, then choose the ranges; without groups, one for all timesteps."""
        o = self.options
        plan.attention = {}
        if context.targets.act_bits is None or isinstance(context.calibration, SampledStatistics):
            return  # weights alone are quantized, or there are no calls to look at
        calls = attention_calls(context.denoiser, context.calibration.example_inputs())
        plan.attention = {name: AttentionPlan(unquantized_reason=self._reason(name, n)) for name, n in calls.items()}
        chosen = [name for name, each in plan.attention.items() if each.unquantized_reason == CHOSEN]
        plan.sections[self.name] = Section({"found": len(plan.attention), "quantized": len(chosen)})
        if not chosen:
            return
        low, high = context.calibration.timestep_range
        plan.groups.setdefault(DEFAULT_GROUPS, TimestepGroups((), low, high))
        plan.range_methods = replace(plan.range_methods, attention=o.observer, attention_power=o.power)
        operands = {name: [operand_name(name, operand) for operand in OPERANDS] for name in chosen}
        with observed({name: context.denoiser.get_submodule(name) for name in chosen}):
            orders = context.find_row_orders([each for names in operands.values() for each in names])
        for done, (name, widths) in enumerate(attention_quantizers(plan, context, chosen, (o.bits,)).items(), 1):
            rows = _order([orders.get(each) for each in operands[name]])
            plan.attention[name] = replace(widths[o.bits], rows=rows)
            yield Progress(done, len(chosen), name)

    def _reason(self, name: str, calls: int) -> Reason:
        if name in self.options.leave:
            return Reason("asked for by the option leave of attention-ranges", "asked")
        if calls == 0:
            return Reason("PyTorch's multi-head attention multiplies inside a function of its own", "unsupported")
        if calls > 1:
            return Reason(f"it attends {calls} times in one call, and the ranges would be of one", "unsupported")
        return CHOSEN


CHOSEN = Reason("no range has been chosen yet", "undecided")


def _order(operands: Sequence[RowOrder | None]) -> RowOrder | None:
    """Where the samples are in all operands: a row of one meets the same row of the others."""
    known = {order for order in operands if order is not None}
    return "mixed" if len(known) > 1 else next(iter(known), None)
