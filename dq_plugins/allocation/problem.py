"""Bit allocation as a choice program.

    minimise    sum_l  E_w[l, w_l] + E_a[l, a_l]
    subject to  sum_l  n_l w_l            <= W sum_l n_l         mean weight bits
                sum_l  m_l a_l            <= A sum_l m_l         mean activation bits
                sum_l  bytes(n_l w_l)     <= bytes               packed weights
                sum_l  macs_l w_l a_l     <= BitOps              a product of two choices
                sum_l  ms[l, w_l, a_l]    <= ms                  from a measured table
                sum_{l in block} n_l w_l  <= cap sum n_l         for single blocks

``w_l`` and ``a_l`` are widths of layer l's weight and input, full precision among them. The product is linear once a
menu holds *pairs* of widths: one column for every (w, a), which is the tightest linear form there is (its relaxation
is the convex hull of each layer's choices). Without a budget that couples the two, weights and inputs get menus of
their own, which are shorter. Budgets may be given alone or together.

Source: MixDQ (Zhao et al. 2024) solves weights and activations apart, with a mean-bits budget each.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from dq_plugins import registry
from dq_plugins.errors import BudgetError
from dq_plugins.sensitivity.candidates import Entry, Side
from dq_plugins.solvers.program import Budget, Choice, ChoiceProgram
from dq_plugins.solvers.solution import Solution


class Width(NamedTuple):
    """Bits of a layer's weight and of its input; None is full precision."""

    weight: int | None = None
    activation: int | None = None

    def __str__(self) -> str:
        """``W4A8``, ``W4`` for a floating-point input, ``full precision``."""
        if self == (None, None):
            return "full precision"
        return "".join(f"{side}{bits}" for side, bits in zip("WA", self, strict=True) if bits is not None)

    @classmethod
    def parse(cls, text: str) -> Width:
        """The width that prints as ``text``.

        Raises:
            BudgetError: it is none.
        """
        found = re.fullmatch(r"(?:W(\d+))?(?:A(\d+))?", text)
        if text == "full precision" or (found and text):
            return cls(*(int(v) if v else None for v in (found.groups() if found else (None, None))))
        raise BudgetError(f"{text!r} is no pair of widths; write W4A8, W4, A8 or 'full precision'")


class Menu(NamedTuple):
    """Widths that a layer may get; None is full precision."""

    weight: tuple[int | None, ...] = (2, 3, 4, 6, 8)
    activation: tuple[int | None, ...] = (None,)


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs.

    Attributes:
        weights: number of elements of its weight.
        inputs: number of elements of its input, for the batch it was traced with; 0: it has no input to quantize.
        macs: multiply-accumulate operations of one denoiser call.
        block: the block whose cap it counts for.
    """

    weights: int
    inputs: int
    macs: int
    block: str = ""


@dataclass(frozen=True)
class Budgets:
    """Limits, alone or together; None: no limit.

    Attributes:
        weight_bits: mean bits of a weight over all layers of the problem.
        act_bits: mean bits of an input element over all layers of the problem.
        bytes: packed weights of all layers, without scales.
        bitops: bit operations of one denoiser call, for the batch it was traced with.
        latency: total of the latency table, in its unit.
        block_bits: cap on the mean weight bits of single blocks.
    """

    weight_bits: float | None = None
    act_bits: float | None = None
    bytes: float | None = None
    bitops: float | None = None
    latency: float | None = None
    block_bits: Mapping[str, float] = field(default_factory=dict)


LatencyTable = Mapping[str, Mapping[Width, float]]
"""Measured time of every layer at every pair of widths."""


@dataclass(frozen=True)
class AllocationProblem:
    """A bit allocation problem.

    Attributes:
        layers: the layers to decide about, and what they cost.
        errors: error that an entry adds; missing entries must not be on a menu. Full precision adds none.
        menus: widths by layer; ``default_menu`` for the others.
        default_menu: see there.
        budgets: the limits.
        latency: measured times; needed when there is a latency budget.
        float_bits: what full precision counts as, in every budget.
    """

    layers: Mapping[str, LayerCost]
    errors: Mapping[Entry, float]
    menus: Mapping[str, Menu] = field(default_factory=dict)
    default_menu: Menu = field(default_factory=Menu)
    budgets: Budgets = field(default_factory=Budgets)
    latency: LatencyTable = field(default_factory=dict)
    float_bits: int = 32

    def __post_init__(self) -> None:
        unknown = [name for name in (*self.menus, *self.latency) if name not in self.layers]
        if unknown:
            close = difflib.get_close_matches(unknown[0], self.layers, n=3)
            hint = f"; close: {', '.join(close)}" if close else ""
            raise BudgetError(f"{unknown[0]!r} is no layer of this allocation{hint}")

    def menu(self, layer: str) -> Menu:
        """Widths that a layer may get; a layer without an input to quantize has the one choice of leaving it."""
        menu = self.menus.get(layer, self.default_menu)
        return menu if self.layers[layer].inputs else menu._replace(activation=(None,))

    @property
    def coupled(self) -> bool:
        """Whether a budget depends on weight and activation bits together."""
        return self.budgets.bitops is not None or self.budgets.latency is not None

    def bits(self, width: int | None) -> int:
        """What a width counts as."""
        return self.float_bits if width is None else width

    def error(self, layer: str, side: Side, width: int | None) -> float:
        """Error of one side of a layer at a width."""
        if width is None:
            return 0.0
        entry = Entry(layer, side, width)
        if entry not in self.errors:
            raise BudgetError(
                f"the menu of layer {layer!r} has {width}-bit {side}s, whose sensitivity was not measured; measure it, "
                "or take the width off the menu"
            )
        return self.errors[entry]

    def program(self) -> tuple[ChoiceProgram, list[tuple[str, Width]]]:
        """The choice program, and for each of its columns the layer and what it chooses there.

        In a program that is not coupled a column chooses one side; the other side of its `Width` is None.
        """
        menus: dict[str, list[tuple[str, Width]]] = {}
        for layer in self.layers:
            weight, activation = self.menu(layer)
            if self.coupled:
                menus[layer] = [(layer, Width(w, a)) for w in weight for a in activation]
            else:
                menus[f"{layer}.weight"] = [(layer, Width(w, None)) for w in weight]
                if self.layers[layer].inputs:
                    menus[f"{layer}.activation"] = [(layer, Width(None, a)) for a in activation]
        columns = [column for menu in menus.values() for column in menu]
        sides = [name.rpartition(".")[2] if not self.coupled else "both" for name, menu in menus.items() for _ in menu]
        error = np.array([self._column_error(*c, side) for c, side in zip(columns, sides, strict=True)])
        start = np.cumsum([0, *map(len, menus.values())])
        return ChoiceProgram(tuple(menus), start, error, self._budgets(columns, sides)), columns

    def _column_error(self, layer: str, width: Width, side: str) -> float:
        weight = 0.0 if side == "activation" else self.error(layer, "weight", width.weight)
        return weight + (0.0 if side == "weight" else self.error(layer, "activation", width.activation))

    def _budgets(self, columns: list[tuple[str, Width]], sides: list[str]) -> tuple[Budget, ...]:
        b = self.budgets
        found: list[Budget] = []

        def add(name: str, limit: float | None, unit: str, cost: Callable[[str, Width], float], side: str) -> None:
            if limit is not None:
                values = [cost(*c) if s in (side, "both") else 0.0 for c, s in zip(columns, sides, strict=True)]
                found.append(Budget(name, np.array(values, dtype=np.float64), float(limit), unit))

        def weight_bits(layer: str, width: Width) -> float:
            return float(self.layers[layer].weights * self.bits(width.weight))

        def input_bits(layer: str, width: Width) -> float:
            return float(self.layers[layer].inputs * self.bits(width.activation))

        weights = sum(cost.weights for cost in self.layers.values())
        inputs = sum(cost.inputs for cost in self.layers.values())
        add("weight bits", total_bits(b.weight_bits, weights), "bits", weight_bits, "weight")
        add("activation bits", total_bits(b.act_bits, inputs), "bits", input_bits, "activation")
        add("bytes", b.bytes, "bytes", lambda layer, w: -(-weight_bits(layer, w) // 8), "weight")
        add("BitOps", b.bitops, "BitOps", self._bitops, "both")
        add("latency", b.latency, "ms", self._latency, "both")
        for block, cap in b.block_bits.items():
            members = {layer for layer, cost in self.layers.items() if cost.block == block}
            if not members:
                raise BudgetError(f"there is no block {block!r} to cap; there are: {', '.join(sorted(self._blocks()))}")
            size = sum(self.layers[layer].weights for layer in members)

            def in_block(layer: str, width: Width, members: set[str] = members) -> float:
                return weight_bits(layer, width) if layer in members else 0.0

            add(f"weight bits of {block}", cap * size, "bits", in_block, "weight")
        return tuple(found)

    def _blocks(self) -> set[str]:
        return {cost.block for cost in self.layers.values() if cost.block}

    def _bitops(self, layer: str, width: Width) -> float:
        return float(self.layers[layer].macs * self.bits(width.weight) * self.bits(width.activation))

    def _latency(self, layer: str, width: Width) -> float:
        try:
            return self.latency[layer][width]
        except KeyError:
            raise BudgetError(
                f"the latency table has no time of layer {layer!r} at {width}; measure it, or take it off the menu"
            ) from None


def total_bits(mean: float | None, size: int) -> float | None:
    """Limit on a total from a limit on its mean; a mean that came from a whole total gives that total again."""
    if mean is None:
        return None
    total = mean * size
    return float(round(total)) if abs(total - round(total)) <= 1e-9 * total else total


@dataclass(frozen=True)
class Allocation:
    """A solved problem.

    Attributes:
        problem: the problem.
        widths: the widths of every layer; empty when there is no solution.
        solution: what the solver says, in columns of ``problem.program()``.
    """

    problem: AllocationProblem
    widths: Mapping[str, Width]
    solution: Solution

    def entries(self) -> list[Entry]:
        """The quantized sides of all layers."""
        return entries_of(self.widths)

    @property
    def error(self) -> float:
        """Predicted error: the sum over all entries."""
        return self.solution.objective


def entries_of(widths: Mapping[str, Width]) -> list[Entry]:
    """The entries that some widths consist of."""
    pairs = [(layer, side, bits) for layer, width in widths.items() for side, bits in zip(SIDES, width, strict=True)]
    return [Entry(layer, side, bits) for layer, side, bits in pairs if bits is not None]


SIDES: tuple[Side, Side] = ("weight", "activation")


def widths_of(columns: list[tuple[str, Width]], choice: Choice) -> dict[str, Width]:
    """Widths of every layer from the chosen columns of either kind of program."""
    widths: dict[str, Width] = {}
    for index in choice:
        layer, chosen = columns[index]
        known = widths.get(layer, Width())
        widths[layer] = Width(*(a if a is not None else b for a, b in zip(known, chosen, strict=True)))
    return widths


def choice_of(program: ChoiceProgram, columns: list[tuple[str, Width]], widths: Mapping[str, Width]) -> Choice:
    """Columns that give some widths; the inverse of `widths_of`."""
    chosen = []
    for name, menu in zip(program.names, program.menus(), strict=True):
        layer = columns[menu[0]][0]
        side = name[len(layer) + 1 :]
        wanted = {"weight": Width(widths[layer].weight), "activation": Width(None, widths[layer].activation)}
        target = wanted.get(side, widths[layer])
        found = [c for c in menu if columns[c][1] == target]
        if not found:
            raise BudgetError(f"{target} is not on the menu of layer {layer!r}")
        chosen.append(found[0])
    return np.array(chosen, dtype=np.int64)


def allocate(
    problem: AllocationProblem, solver: str = "cp-sat", *, hint: Mapping[str, Width] | None = None, **options: Any
) -> Allocation:
    """Solve a bit allocation problem.

    Args:
        problem: the problem.
        solver: a registered solver.
        hint: widths that may be a good start.
        options: options of the solver.

    Returns:
        The allocation; its solution says whether it is proven optimal, or why there is none.
    """
    program, columns = problem.program()
    start = None if not hint else choice_of(program, columns, hint)
    solution: Solution = registry.get("solver", solver)(program, hint=start, **options)
    return Allocation(problem, widths_of(columns, solution.choice), solution)
