"""What a plan says about one attention: how the operands of its two products are quantized.

An attention computes ``softmax(q k^T / sqrt(D) + mask) v``. Quantized, query, key and value are codes with one scale
and zero point per timestep group, as the inputs of layers are, and so are the probabilities: eight bits, with the fixed
scale 1/255 before they are divided by their sum. `dq_plugins.quantized.attention` states the definition.
"""

from __future__ import annotations

from dataclasses import dataclass

from dq_plugins.artifact import STRICT
from dq_plugins.errors import PlanError
from dq_plugins.plan.brief import brief
from dq_plugins.plan.layers import ActivationQuant, Reason
from dq_plugins.timesteps import RowOrder

OPERANDS = ("query", "key", "value")


@dataclass
class AttentionPlan:
    """Decisions for one attention: the call of ``scaled_dot_product_attention`` by one module.

    Attributes:
        query: its quantizer; None, as the others, where the attention stays in floating point.
        key: likewise.
        value: likewise.
        unquantized_reason: why it stays in floating point; required then.
        rows: where the samples of a call are in the operands; None: not known.
    """

    __pydantic_config__ = STRICT
    __repr__ = brief

    query: ActivationQuant | None = None
    key: ActivationQuant | None = None
    value: ActivationQuant | None = None
    unquantized_reason: Reason | None = None
    rows: RowOrder | None = None

    def __post_init__(self) -> None:
        missing = [name for name in OPERANDS if getattr(self, name) is None]
        if missing and len(missing) < len(OPERANDS):
            raise PlanError(
                f"the operands of an attention are quantized together; it has no {' and no '.join(missing)}"
            )
        if any(quant.group_bits is not None for quant in self.quantizers.values()):
            raise PlanError("the operands of an attention have one width in all timestep groups")
        if missing and self.unquantized_reason is None:
            raise PlanError("an attention is in full precision and the plan does not say why")

    @property
    def quantized(self) -> bool:
        """Whether its products are."""
        return self.query is not None

    @property
    def why(self) -> str:
        """Text of the reason; empty without one."""
        return "" if self.unquantized_reason is None else self.unquantized_reason.text

    @property
    def quantizers(self) -> dict[str, ActivationQuant]:
        """By operand; empty for one in floating point."""
        found = {name: getattr(self, name) for name in OPERANDS}
        return found if self.quantized else {}

    @property
    def width(self) -> str:
        """Short name such as ``A8``, or ``full precision``."""
        widths = sorted({quant.bits for quant in self.quantizers.values()})
        return f"A{'/'.join(map(str, widths))}" if widths else "full precision"
