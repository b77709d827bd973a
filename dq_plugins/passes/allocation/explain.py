"""Why each layer has the width it has: its score, its cost, and what one more step up would buy.

This answers "which layers must stay in high precision" by measurement, where other tools ship lists of names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dq_plugins.errors import PlanError
from dq_plugins.passes.allocation.problem import AllocationProblem
from dq_plugins.passes.allocation.solve import Allocation
from dq_plugins.plan import QuantPlan
from dq_plugins.quantized.candidates import Side
from dq_plugins.quantized.width import SIDES


@dataclass(frozen=True)
class LayerReason:
    """One side of one layer.

    Attributes:
        layer: fully qualified name.
        side: ``"weight"`` or ``"activation"``.
        bits: chosen width; None is full precision.
        share: its part of the plan's predicted error.
        bytes: packed bytes (weights) or bits of the input over 8 (activations).
        floor: error at the narrowest width of its menu, relative to the plan's whole error: how much it would hurt.
        more_bits: the next wider width on its menu; None when there is none, or it is full precision.
        saved: part of the plan's predicted error that the next wider width would save.
        extra: bytes that it would cost.
    """

    layer: str
    side: Side
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
            return f"{name}, the widest on its menu: {hurt}"
        wider = "full precision" if self.more_bits is None else f"{self.more_bits} bits"
        return f"{name}: {hurt}; {wider} would save {self.saved:.2%} of the error for {self.extra:,} bytes"

    def as_data(self) -> dict[str, Any]:
        """JSON data."""
        return asdict(self)


def explain(allocation: Allocation) -> list[LayerReason]:
    """Reasons for every side of every layer that had a choice or was quantized, the costliest to narrow first.

    Args:
        allocation: one with a solution.
    """
    problem, widths = allocation.problem, allocation.widths
    total = allocation.error or 1.0
    reasons = [
        _reason(problem, layer, side, getattr(width, side), total)
        for layer, width in widths.items()
        for side in (SIDES if problem.layers[layer].inputs else SIDES[:1])
        if getattr(width, side) is not None or len(getattr(problem.menu(layer), side)) > 1
    ]
    return sorted(reasons, key=lambda r: (-r.floor, r.layer, r.side))


def _reason(problem: AllocationProblem, layer: str, side: Side, bits: int | None, total: float) -> LayerReason:
    menu = sorted(getattr(problem.menu(layer), side), key=problem.bits)  # narrowest first, full precision last
    cost = problem.layers[layer]
    count = cost.weights if side == "weight" else cost.inputs

    def size(width: int | None) -> int:
        return -(-count * problem.bits(width) // 8)

    error = problem.error(layer, side, bits)
    floor = problem.error(layer, side, menu[0]) / total
    reason = LayerReason(layer, side, bits, error / total, size(bits), floor)
    wider = menu[menu.index(bits) + 1 :]
    if not wider:
        return reason
    saved = (error - problem.error(layer, side, wider[0])) / total
    return replace(reason, more_bits=wider[0], saved=saved, extra=size(wider[0]) - size(bits))


def explanation(plan: QuantPlan, limit: int | None = None) -> str:
    """The reasons that a plan made by ``bit-allocation`` holds: what the solver says, then one line a side.

    Args:
        plan: the plan.
        limit: how many lines; all by default.

    Raises:
        PlanError: no bit allocation made this plan.
    """
    section = plan.sections.get("bit-allocation")
    if section is None:
        raise PlanError(
            "this plan has no section 'bit-allocation': its widths were given, not chosen, so none has a reason"
        )
    data = section.data
    held = ", ".join(data["binding"]) or "no budget"
    head = (
        f"{data['status']} ({data['solver']}, gap {data['gap']:.1e}), held back by {held}; "
        f"{data['mean_weight_bits']:.3f} bits a weight"
    )
    return head + "\n" + table_of_reasons([LayerReason(**reason) for reason in data["reasons"]], limit)


def table_of_reasons(reasons: Sequence[LayerReason], limit: int | None = None) -> str:
    """The reasons as text, one line each.

    Args:
        reasons: from `explain`.
        limit: how many lines; all by default.
    """
    shown = list(reasons if limit is None else reasons[:limit])
    width = max((len(f"{r.layer}.{r.side}") for r in shown), default=0)
    lines = [f"{f'{r.layer}.{r.side}':<{width}}  {r.why}" for r in shown]
    if len(shown) < len(reasons):
        lines.append(f"... and {len(reasons) - len(shown)} more, each with less effect")
    return "\n".join(lines)
