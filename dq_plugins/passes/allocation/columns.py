"""Columns of the choice program: what each of them means, and widths as a choice of columns and back.

Where a budget couples weights and inputs, a layer has one menu of pairs; elsewhere its weight and its input have menus
of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from dq_plugins.errors import BudgetError
from dq_plugins.quantized.candidates import Side
from dq_plugins.quantized.width import Width
from dq_plugins.solvers.program import Choice, ChoiceProgram


class Column(NamedTuple):
    """What one column of the program chooses.

    Attributes:
        layer: fully qualified name.
        width: the choice; None on a side that the column does not decide.
        side: the side that it decides, or both.
    """

    layer: str
    width: Width
    side: Side | Literal["both"]

    def decided_part(self, width: Width) -> Width:
        """Of a layer's width, what columns of this side choose."""
        if self.side == "both":
            return width
        return Width(weight=width.weight) if self.side == "weight" else Width(activation=width.activation)


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
        BudgetError: a layer's menu lacks its width.
    """
    chosen = []
    for menu in program.menus():
        first = columns[menu[0]]
        target = first.decided_part(widths[first.layer])
        found = [index for index in menu if columns[index].width == target]
        if not found:
            offered = ", ".join(str(columns[index].width) for index in menu)
            raise BudgetError(f"{target} is not on the menu of layer {first.layer!r}, which offers: {offered}")
        chosen.append(found[0])
    return np.array(chosen, dtype=np.int64)
