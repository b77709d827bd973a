"""Columns of the choice program: what each of them means, and widths as a choice of columns and back.

Where a budget couples weights and inputs, a layer chooses among pairs; elsewhere its weight and its input have choices
of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from dq_plugins.errors import BudgetError
from dq_plugins.quantized.candidates import Operand
from dq_plugins.quantized.width import Width
from dq_plugins.solvers.program import Choice, ChoiceProgram


class Column(NamedTuple):
    """What one column of the program chooses.

    Attributes:
        layer: fully qualified name.
        width: the choice; None on an operand that the column does not decide.
        operand: the operand that it decides, or both.
    """

    layer: str
    width: Width
    operand: Operand | Literal["both"]

    def decided_part(self, width: Width) -> Width:
        """Of a layer's width, what columns of this operand choose."""
        if self.operand == "both":
            return width
        return Width(weight=width.weight) if self.operand == "weight" else Width(activation=width.activation)


def widths_of(columns: Sequence[Column], choice: Choice) -> dict[str, Width]:
    """Widths of every layer from the chosen columns."""
    widths: dict[str, Width] = {}
    for index in choice:
        column = columns[index]
        known = widths.get(column.layer, Width())
        widths[column.layer] = Width(*(a if a is not None else b for a, b in zip(known, column.width, strict=True)))
    return widths


def choice_of(program: ChoiceProgram, columns: Sequence[Column], widths: Mapping[str, Width]) -> Choice:
    """Columns that give some widths; the inverse of `widths_of`.

    Raises:
        BudgetError: a layer's choices lack its width.
    """
    chosen = []
    for choice_set in program.choice_sets():
        first = columns[choice_set[0]]
        target = first.decided_part(widths[first.layer])
        found = [index for index in choice_set if columns[index].width == target]
        if not found:
            offered = ", ".join(str(columns[index].width) for index in choice_set)
            raise BudgetError(f"{target} is not among the choices of layer {first.layer!r}, which offers: {offered}")
        chosen.append(found[0])
    return np.array(chosen, dtype=np.int64)
