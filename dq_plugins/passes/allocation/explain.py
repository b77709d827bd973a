"""Why each layer has the width it has: its score, its cost, and what one more step up would buy.

This answers "which layers must stay in high precision" by measurement, where other tools ship lists of names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dq_plugins.passes.allocation.problem import AllocationProblem
from dq_plugins.passes.allocation.solve import Allocation
from dq_plugins.quantized.candidates import Operand
from dq_plugins.quantized.width import OPERANDS


@dataclass(frozen=True)
class LayerReason:
    """One operand of one layer.

    Attributes:
        layer: fully qualified name.
        operand: ``"weight"`` or ``"activation"``.
        bits: chosen width; None is full precision.
        share: its part of the plan's predicted error.
        bytes: packed bytes (weights) or bits of the input over 8 (activations).
        floor: error at the narrowest of its choices, relative to the plan's whole error: how much it would hurt.
        more_bits: the next wider of its choices; None when there is none, or it is full precision.
        saved: part of the plan's predicted error that the next wider width would save.
        extra: bytes that it would cost.
    """

    layer: str
    operand: Operand
    bits: int | None
    share: float
    bytes: int
    floor: float
    more_bits: int | None = None
    saved: float = 0.0
    extra: int = 0

    @property
    def why(self) -> str:
        """One sentence."""
        name = "full precision" if self.bits is None else f"{self.bits} bits"
        if self.floor > 1:
            hurt = f"the narrowest width alone would multiply the plan's error by {1 + self.floor - self.share:.3g}"
        else:
            hurt = f"at the narrowest width it would make {self.floor:.1%} of the plan's error"
        if not self.extra:
            return f"{name}, its widest choice: {hurt}"
        wider = "full precision" if self.more_bits is None else f"{self.more_bits} bits"
        return f"{name}: {hurt}; {wider} would save {self.saved:.2%} of the error for {self.extra:,} bytes"


def explain(allocation: Allocation) -> list[LayerReason]:
    """Reasons for every operand of every layer that had a choice or was quantized, the costliest to narrow first.

    Args:
        allocation: one with a solution.
    """
    problem, widths = allocation.problem, allocation.widths
    total = allocation.error or 1.0
    reasons = [
        _reason(problem, layer, operand, getattr(width, operand), total)
        for layer, width in widths.items()
        for operand in (OPERANDS if problem.layers[layer].inputs else OPERANDS[:1])
        if getattr(width, operand) is not None or len(getattr(problem.choices_for(layer), operand)) > 1
    ]
    return sorted(reasons, key=lambda r: (-r.floor, r.layer, r.operand))


def _reason(problem: AllocationProblem, layer: str, operand: Operand, bits: int | None, total: float) -> LayerReason:
    choices = sorted(
        getattr(problem.choices_for(layer), operand), key=problem.bits
    )  # narrowest first, full precision last
    cost = problem.layers[layer]
    count = cost.weights if operand == "weight" else cost.inputs

    def size(width: int | None) -> int:
        return -(-count * problem.bits(width) // 8)

    error = problem.error(layer, operand, bits)
    floor = problem.error(layer, operand, choices[0]) / total
    reason = LayerReason(layer, operand, bits, error / total, size(bits), floor)
    wider = choices[choices.index(bits) + 1 :]
    if not wider:
        return reason
    saved = (error - problem.error(layer, operand, wider[0])) / total
    return replace(reason, more_bits=wider[0], saved=saved, extra=size(wider[0]) - size(bits))


def table_of_reasons(reasons: Sequence[LayerReason], limit: int | None = None) -> str:
    """The reasons as text, one line each.

    Args:
        reasons: from `explain`.
        limit: how many lines; all by default.
    """
    shown = list(reasons if limit is None else reasons[:limit])
    width = max((len(f"{r.layer}.{r.operand}") for r in shown), default=0)
    lines = [f"{f'{r.layer}.{r.operand}':<{width}}  {r.why}" for r in shown]
    if len(shown) < len(reasons):
        lines.append(f"... and {len(reasons) - len(shown)} more, each with less effect")
    return "\n".join(lines)
