"""Why each layer has the width it has: its score, its cost, and what one more step up would buy.

This answers "which layers must stay in high precision" by measurement, where other tools ship lists of names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dq_plugins.errors import PlanError
from dq_plugins.passes.allocation.solve import Allocation
from dq_plugins.plan import QuantPlan
from dq_plugins.quantized.candidates import Side
from dq_plugins.quantized.width import Width


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
    sides = [(layer, side) for layer in allocation.widths for side in _sides(allocation, layer)]
    chosen = {(layer, side): _of(allocation.widths[layer], side) for layer, side in sides}
    total = sum(_error(allocation, *key, bits) for key, bits in chosen.items()) or 1.0
    decided = [key for key in sides if len(_menu(allocation, *key)) > 1 or chosen[key] is not None]
    reasons = [_reason(allocation, *key, chosen[key], total) for key in decided]
    return sorted(reasons, key=lambda r: (-r.floor, r.layer, r.side))


def _sides(allocation: Allocation, layer: str) -> tuple[Side, ...]:
    return ("weight", "activation") if allocation.problem.layers[layer].inputs else ("weight",)


def _of(width: Width, side: Side) -> int | None:
    return width.weight if side == "weight" else width.activation


def _menu(allocation: Allocation, layer: str, side: Side) -> list[int | None]:
    """Widths of the menu, narrowest first, full precision last."""
    menu = allocation.problem.menu(layer)
    widths = menu.weight if side == "weight" else menu.activation
    return sorted(widths, key=lambda w: math.inf if w is None else w)


def _error(allocation: Allocation, layer: str, side: Side, bits: int | None) -> float:
    return allocation.problem.error(layer, side, bits)


def _bytes(allocation: Allocation, layer: str, side: Side, bits: int | None) -> int:
    cost = allocation.problem.layers[layer]
    count = cost.weights if side == "weight" else cost.inputs
    return -(-count * allocation.problem.bits(bits) // 8)


def _reason(allocation: Allocation, layer: str, side: Side, bits: int | None, total: float) -> LayerReason:
    menu = _menu(allocation, layer, side)
    error = _error(allocation, layer, side, bits)
    wider = menu[menu.index(bits) + 1 :][:1]
    size = _bytes(allocation, layer, side, bits)
    floor = _error(allocation, layer, side, menu[0]) / total
    if not wider:
        return LayerReason(layer, side, bits, error / total, size, floor)
    return LayerReason(
        layer,
        side,
        bits,
        error / total,
        size,
        floor,
        more_bits=wider[0],
        saved=(error - _error(allocation, layer, side, wider[0])) / total,
        extra=_bytes(allocation, layer, side, wider[0]) - size,
    )


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
