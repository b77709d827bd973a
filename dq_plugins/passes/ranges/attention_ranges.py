"""Pass ``attention-ranges``: the clip ranges of query, key and value of every attention, in every timestep group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import nn

from dq_plugins.affine import affine_parameters
from dq_plugins.passes.activations import DEFAULT_GROUPS, Ranges, input_ranges, shared_rows
from dq_plugins.plan import ActivationQuant, AttentionPlan, QuantPlan, Reason, Section
from dq_plugins.plan.attention import OPERANDS
from dq_plugins.quantized.attention import SITE, ObservedAttention, attention_calls, quantize_attention
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
        groups = plan.groups.setdefault(DEFAULT_GROUPS, TimestepGroups((), low, high))
        bits = {operand_name(name, operand): o.bits for name in chosen for operand in OPERANDS}
        methods = replace(plan.range_methods, inputs=o.observer, power=o.power)
        with observed({name: context.denoiser.get_submodule(name) for name in chosen}):
            orders = context.find_row_orders(bits)
            ranges = input_ranges(context, bits, groups, methods, shared_rows(plan, DEFAULT_GROUPS))
        for done, name in enumerate(chosen, 1):
            plan.attention[name] = self._planned(name, ranges, symmetric=context.targets.symmetric_acts)
            plan.attention[name].rows = _order([orders.get(operand_name(name, operand)) for operand in OPERANDS])
            yield Progress(done, len(chosen), name)

    def _planned(self, name: str, ranges: Ranges, *, symmetric: bool) -> AttentionPlan:
        bits, quantizers = self.options.bits, {}
        for operand in OPERANDS:
            parameters = affine_parameters(*ranges[operand_name(name, operand)], bits, symmetric=symmetric)
            quantizers[operand] = ActivationQuant(bits, DEFAULT_GROUPS, *(p.cpu() for p in parameters))
        return AttentionPlan(**quantizers)

    def _reason(self, name: str, calls: int) -> Reason:
        if name in self.options.leave:
            return Reason("asked for by the option leave of attention-ranges", "asked")
        if calls == 0:
            return Reason("PyTorch's multi-head attention multiplies inside a function of its own", "unsupported")
        if calls > 1:
            return Reason(f"it attends {calls} times in one call, and the ranges would be of one", "unsupported")
        return CHOSEN


CHOSEN = Reason("no range has been chosen yet", "undecided")


def operand_name(module: str, operand: str) -> str:
    """Fully qualified name of what an operand passes through while the module is observed."""
    return ".".join(filter(None, (module, SITE, operand)))


def _order(operands: Sequence[RowOrder | None]) -> RowOrder | None:
    """Where the samples are in all operands: a row of one meets the same row of the others."""
    known = {order for order in operands if order is not None}
    return "mixed" if len(known) > 1 else next(iter(known), None)


@contextmanager
def observed(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Query, key and value of attentions pass through modules of their own, whose inputs can be observed."""
    with ExitStack() as stack:
        for module in modules.values():
            stack.enter_context(quantize_attention(module, ObservedAttention()))
        yield
