"""Widths: the bits of a layer's weight and input, alone and as choices."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from dq_plugins.errors import BudgetError
from dq_plugins.quantized.candidates import Entry, Operand

OPERANDS: tuple[Operand, Operand] = ("weight", "activation")


class Width(NamedTuple):
    """Bits of a layer's weight and of its input; None is full precision."""

    weight: int | None = None
    activation: int | None = None

    def __str__(self) -> str:
        """``W4A8``, ``W4`` for a floating-point input, ``full precision``."""
        if self == (None, None):
            return "full precision"
        return "".join(f"{operand}{bits}" for operand, bits in zip("WA", self, strict=True) if bits is not None)

    @classmethod
    def parse(cls, text: str) -> Width:
        """The width that prints as ``text``.

        Raises:
            BudgetError: it is none.
        """
        found = re.fullmatch(r"(?:W(\d+))?(?:A(\d+))?", text)
        if text == "full precision" or (found and text):
            return cls(*(int(v) if v else None for v in (found.groups() if found else (None, None))))
        raise BudgetError(f"{text!r} is not a pair of widths; write W4A8, W4, A8 or 'full precision'")


class WidthChoices(NamedTuple):
    """Widths that a layer may get; None is full precision."""

    weight: tuple[int | None, ...] = (2, 3, 4, 6, 8)
    activation: tuple[int | None, ...] = (None,)


def widths_of(entries: Iterable[Entry]) -> dict[str, Width]:
    """The widths that some entries make together; the other operand of their layers is in full precision."""
    widths: dict[str, Width] = {}
    for layer, operand, bits in entries:
        widths[layer] = widths.get(layer, Width())._replace(**{operand: bits})
    return widths


def entries_of(widths: Mapping[str, Width]) -> list[Entry]:
    """The entries that some widths consist of."""
    pairs = [
        (layer, operand, bits) for layer, width in widths.items() for operand, bits in zip(OPERANDS, width, strict=True)
    ]
    return [Entry(layer, operand, bits) for layer, operand, bits in pairs if bits is not None]
