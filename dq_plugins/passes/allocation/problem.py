"""Bit allocation as a choice program.

    minimise    sum_l  E_w[l, w_l] + E_a[l, a_l]
    subject to  sum_l  n_l w_l            <= W sum_l n_l         mean weight bits
                sum_l  m_l a_l            <= A sum_l m_l         mean activation bits
                sum_l  bytes(n_l w_l)     <= bytes               packed weights
                sum_l  macs_l w_l a_l     <= BitOps              a product of two choices; of an attention see below
                sum_l  ms[l, w_l, a_l]    <= ms                  from a measured table
                sum_{l in block} n_l w_l  <= cap sum n_l         for single blocks

``w_l`` and ``a_l`` are widths of layer l's weight and input, full precision among them. The product is linear once the
choices are *pairs* of widths: one column for every (w, a), which is the tightest linear form there is (its relaxation
is the convex hull of each layer's choices). Without a budget that couples the two, weights and inputs get choices of
their own, which are shorter. Budgets may be given alone or together.

An attention is a layer without weights whose input is query, key and value: of a bits, its two products take
``macs_qk a a + macs_pv 8 a`` bit operations, because probabilities have 8 bits.

The error of the final image is not linear in the choices, because the drifts of layers add up in amplitude
(`dq_plugins.sensitivity.drift`). `allocate_image` solves the program that is linear around a plan, again around its
answer, and so on; of all answers the one with the least predicted error is kept.

Source: MixDQ (Zhao et al. 2024) solves weights and activations apart, with a mean-bits budget each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from pydantic import Field

from dq_plugins import registry
from dq_plugins.errors import BudgetError, close_matches
from dq_plugins.passes.allocation.columns import Column, widths_of
from dq_plugins.quantized.attention import PROBABILITY_BITS
from dq_plugins.quantized.candidates import Entry, Operand
from dq_plugins.quantized.width import Width, WidthChoices, entries_of
from dq_plugins.recipe import PassOptions
from dq_plugins.sensitivity.drift import ImageError
from dq_plugins.solvers.program import Budget, ChoiceProgram
from dq_plugins.solvers.solution import Solution


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs.

    Attributes:
        weights: number of elements of its weight.
        inputs: number of elements of its input, for the batch it was traced with; 0: it has no input to quantize.
        macs: multiply-accumulate operations of one denoiser call.
        block: the block whose cap it counts for.
        group_scale_bytes: what the scales of groups of inputs take, by width of the weight; none by default.
        value_macs: of an attention, those of its ``macs`` that multiply probabilities with values; None: it is a layer.
    """

    weights: int
    inputs: int
    macs: int
    block: str = ""
    group_scale_bytes: Mapping[int, int] = field(default_factory=dict)
    value_macs: int | None = None

    def bit_operations(self, width: Width, float_bits: int) -> float:
        """Bit operations at a width, in full precision of ``float_bits``."""
        weight, activation = (float_bits if bits is None else bits for bits in width)
        if self.value_macs is None:
            return float(self.macs * weight * activation)
        probabilities = float_bits if width.activation is None else PROBABILITY_BITS
        return float(((self.macs - self.value_macs) * activation + self.value_macs * probabilities) * activation)


class Budgets(PassOptions):
    """Limits, alone or together; None: no limit.

    Attributes:
        weight_bits: mean bits of a weight over all layers of the problem.
        act_bits: mean bits of an input element over all layers of the problem.
        bytes: packed weights of all layers, and the scales of groups of inputs; without those of outputs.
        bitops: bit operations of one denoiser call, for the batch it was traced with; of layers, and of the attentions
            that the plan quantizes.
        latency: total of the latency table, in its unit.
        block_bits: cap on the mean weight bits of single blocks.
    """

    weight_bits: float | None = Field(None, gt=0)
    act_bits: float | None = Field(None, gt=0)
    bytes: float | None = Field(None, gt=0)
    bitops: float | None = Field(None, gt=0)
    latency: float | None = Field(None, gt=0)
    block_bits: dict[str, float] = Field(default_factory=dict)


LatencyTable = Mapping[str, Mapping[Width, float]]
"""Measured time of every layer at every pair of widths."""


@dataclass(frozen=True)
class AllocationProblem:
    """A bit allocation problem.

    Attributes:
        layers: the layers to decide about, and what they cost.
        errors: error that an entry adds; missing entries must not be among the choices. Full precision adds none.
        choices: widths by layer.
        default_choices: widths of every layer that ``choices`` does not name.
        budgets: the limits.
        latency: measured times; needed when there is a latency budget.
        float_bits: what full precision counts as, in every budget.
    """

    layers: Mapping[str, LayerCost]
    errors: Mapping[Entry, float]
    choices: Mapping[str, WidthChoices] = field(default_factory=dict)
    default_choices: WidthChoices = field(default_factory=WidthChoices)
    budgets: Budgets = field(default_factory=Budgets)
    latency: LatencyTable = field(default_factory=dict)
    float_bits: int = 32

    def __post_init__(self) -> None:
        unknown = [name for name in (*self.choices, *self.latency) if name not in self.layers]
        if unknown:
            hint = close_matches(unknown[0], self.layers)
            raise BudgetError(f"{unknown[0]!r} is not a layer of this allocation{hint}")

    def choices_for(self, layer: str) -> WidthChoices:
        """Widths that a layer may get; a layer without an input to quantize has the one choice of leaving it."""
        choices = self.choices.get(layer, self.default_choices)
        return choices if self.layers[layer].inputs else choices._replace(activation=(None,))

    def with_least(self, layers: Iterable[str], bits: int) -> AllocationProblem:
        """The problem without choices of fewer bits for the weights and inputs of some layers.

        Where a layer has none as wide, its widest one stays. The first and the last layer at 8 bits, as usual.
        """

        def wide(choices: tuple[int | None, ...]) -> tuple[int | None, ...]:
            return tuple(w for w in choices if self.bits(w) >= bits) or (max(choices, key=self.bits),)

        narrowed = {name: WidthChoices(*map(wide, self.choices_for(name))) for name in layers}
        return replace(self, choices={**self.choices, **narrowed})

    @property
    def coupled(self) -> bool:
        """Whether a budget depends on weight and activation bits together."""
        return self.budgets.bitops is not None or self.budgets.latency is not None

    def bits(self, width: int | None) -> int:
        """What a width counts as."""
        return self.float_bits if width is None else width

    def error(self, layer: str, operand: Operand, width: int | None) -> float:
        """Error of one operand of a layer at a width."""
        return error_of(self.errors, layer, Width(**{operand: width}))

    def program(self) -> tuple[ChoiceProgram, list[Column]]:
        """The choice program, and what each of its columns means."""
        offered: dict[str, list[Column]] = {}
        for layer, cost in self.layers.items():
            weight, activation = self.choices_for(layer)
            if self.coupled:
                offered[layer] = [Column(layer, Width(w, a), "both") for w in weight for a in activation]
                continue
            offered[f"{layer}.weight"] = [Column(layer, Width(weight=w), "weight") for w in weight]
            if cost.inputs:
                offered[f"{layer}.activation"] = [Column(layer, Width(activation=a), "activation") for a in activation]
        columns = [column for options in offered.values() for column in options]
        start = np.cumsum([0, *map(len, offered.values())])
        # the operand that a column does not decide is None there, which adds nothing
        error = np.array([error_of(self.errors, column.layer, column.width) for column in columns])
        return ChoiceProgram(tuple(offered), start, error, tuple(self._budgets(columns))), columns

    def _budgets(self, columns: Sequence[Column]) -> Iterator[Budget]:
        given = self.budgets
        weights = sum(cost.weights for cost in self.layers.values())
        inputs = sum(cost.inputs for cost in self.layers.values())
        limits: list[tuple[str, float | None, str, Callable[[Column], float]]] = [
            ("weight bits", given.weight_bits and total_bits(given.weight_bits, weights), "bits", self._weight_bits),
            ("activation bits", given.act_bits and total_bits(given.act_bits, inputs), "bits", self._input_bits),
            ("bytes", given.bytes, "bytes", self._weight_bytes),
            ("BitOps", given.bitops, "BitOps", self._bitops),
            ("latency", given.latency, "ms", lambda column: time_of(self.latency, column.layer, column.width)),
        ]
        for name, limit, unit, cost in limits:
            if limit is not None:
                yield Budget(name, np.array([cost(c) for c in columns], dtype=np.float64), float(limit), unit)
        for block, cap in given.block_bits.items():
            yield self._block_budget(block, cap, columns)

    def _block_budget(self, block: str, cap: float, columns: Sequence[Column]) -> Budget:
        members = {layer for layer, cost in self.layers.items() if cost.block == block}
        if not members:
            known = sorted({cost.block for cost in self.layers.values() if cost.block})
            raise BudgetError(f"there is no block {block!r} to cap; there are: {', '.join(known)}")
        size = sum(self.layers[layer].weights for layer in members)
        values = [self._weight_bits(c) if c.layer in members else 0.0 for c in columns]
        return Budget(f"weight bits of {block}", np.array(values, dtype=np.float64), float(cap * size), "bits")

    def _weight_bits(self, column: Column) -> float:
        decided = column.operand != "activation"
        return float(self.layers[column.layer].weights * self.bits(column.width.weight)) if decided else 0.0

    def _weight_bytes(self, column: Column) -> float:
        scales = self.layers[column.layer].group_scale_bytes.get(column.width.weight or 0, 0)
        return -(-self._weight_bits(column) // 8) + (scales if column.operand != "activation" else 0)

    def _input_bits(self, column: Column) -> float:
        decided = column.operand != "weight"
        return float(self.layers[column.layer].inputs * self.bits(column.width.activation)) if decided else 0.0

    def _bitops(self, column: Column) -> float:
        return self.layers[column.layer].bit_operations(column.width, self.float_bits)


def error_of(errors: Mapping[Entry, float], layer: str, width: Width) -> float:
    """Error that a layer adds at a width: the sum of both operands; full precision adds none.

    Raises:
        BudgetError: an entry was not measured.
    """
    total = 0.0
    for entry in entries_of({layer: width}):
        if entry not in errors:
            raise BudgetError(
                f"the choices of layer {layer!r} have {entry.bits}-bit {entry.operand}s, whose sensitivity was not "
                "measured; measure it, or take the width off the choices"
            )
        total += errors[entry]
    return total


def time_of(latency: LatencyTable, layer: str, width: Width) -> float:
    """Measured time of a layer at a width.

    Raises:
        BudgetError: the table lacks it.
    """
    try:
        return latency[layer][width]
    except KeyError:
        raise BudgetError(
            f"the latency table has no time of layer {layer!r} at {width}; measure it, or take it off the choices"
        ) from None


def total_bits(mean: float, size: int) -> float:
    """Limit on a total from a limit on its mean; a mean that came from a whole total gives that total again."""
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

    @property
    def error(self) -> float:
        """Predicted error: the sum over all entries."""
        return self.solution.objective


def allocate(problem: AllocationProblem, solver: str = "cp-sat", **options: Any) -> Allocation:
    """Solve a problem with a registered solver and its options.

    The solution says whether the widths are proven optimal, or why there are none.
    """
    program, columns = problem.program()
    solution: Solution = registry.function("solver", solver)(program, hint=None, **options)
    return Allocation(problem, widths_of(columns, solution.choice), solution)


ROUNDS = 8
"""How often `allocate_image` solves again, at most."""


def allocate_image(problem: AllocationProblem, image: ImageError, solver: str = "cp-sat", **options: Any) -> Allocation:
    """Solve for the least predicted error of the final image.

    Args:
        problem: layers, choices and budgets; its errors are not used.
        image: what every entry among the choices does to the image.
        solver: registered solver.
        options: of the solver.

    Returns:
        The best answer; its problem has the errors that each change of one operand would make beside it, and its
        solution is that of the linear program which it came from.
    """
    errors: Mapping[Entry, float] = image.alone()
    answers: list[tuple[float, Mapping[str, Width], Solution]] = []
    for _ in range(ROUNDS):
        allocation = allocate(replace(problem, errors=errors), solver, **options)
        if not allocation.widths or any(allocation.widths == known for _, known, _ in answers):
            break
        entries = entries_of(allocation.widths)
        answers.append((image.of(entries), allocation.widths, allocation.solution))
        errors = image.beside(entries)
    if not answers:
        return allocation
    _, widths, solution = min(answers, key=lambda each: each[0])
    return Allocation(replace(problem, errors=image.beside(entries_of(widths))), widths, solution)
