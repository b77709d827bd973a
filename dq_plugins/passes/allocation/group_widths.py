"""Pass ``group-widths``: the width of every layer's input in every timestep group, by an exact program.

    minimise    sum_{l,g} r[l, g, a]  +  | sum_{l,g} c[l, g, a] |^2          error of the final image
    subject to  sum_{l,g} share_g m_l a        <=  A sum_l m_l               mean bits of an input
                sum_{l,g} share_g macs_l w_l a <=  BitOps                    of a mean call
                sum_{l,g} share_g ms[l, w, a]  <=  ms                        likewise

``a`` is the width of layer l's input in group g, floating point among the choices; ``share_g`` the share of the steps
that sampling takes in the group; ``w_l`` the width that the weight has already. Errors at the steps of one group add up
as they are; over groups and layers what all images have in common adds up in amplitude and the rest in power
(`dq_plugins.sensitivity.drift`).

Dynamic ranges take part: a width for each of the default groups, but no floating point.

Source: AdaTSQ (arXiv 2602.09883) searches widths over layers and timesteps with a beam; the program is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from dq_plugins.errors import RecipeError
from dq_plugins.passes.activations import DEFAULT_GROUPS
from dq_plugins.passes.allocation.problem import time_of
from dq_plugins.passes.image_errors import candidate_errors, whole_runs
from dq_plugins.passes.width_candidates import activation_candidates
from dq_plugins.plan import (
    ActivationQuant,
    DynamicActivationQuant,
    InputQuant,
    LayerPlan,
    QuantPlan,
    Reason,
    Section,
)
from dq_plugins.plan.layers import EDGE_ROLES
from dq_plugins.quantized.candidates import Candidates, GroupEntry
from dq_plugins.quantized.width import Width
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.sensitivity.drift import ImageError
from dq_plugins.solvers.answer import answer
from dq_plugins.solvers.drifting import DriftingProgram, beam_search, greedy_drifting, solve_drifting
from dq_plugins.solvers.program import Budget, Choice, ChoiceProgram
from dq_plugins.solvers.solution import Solution, Use

Slot = tuple[str, int]
"""A layer and a timestep group of its input."""


@dataclass(frozen=True)
class GroupWidthFindings:
    """The answer.

    Attributes:
        status: of the solution, see `dq_plugins.solvers.solution.Solution`.
        error: predicted mean square error of the final image, from inputs alone.
        bound: no choice within the budgets has less.
        greedy: what greedy finds; None: nothing.
        beam: what beam search finds.
        budgets: what the answer uses of each.
        widths: by layer, the width in each group.
    """

    status: str
    error: float
    bound: float
    greedy: float | None
    beam: float | None
    budgets: tuple[Use, ...]
    widths: dict[str, tuple[int | None, ...]]


class GroupWidths(Pass):
    """Choose the width of every layer's input in every timestep group, by an exact program."""

    name = "group-widths"
    requires = ("weight-ranges", "timestep-groups", "activation-ranges")
    after = ("bit-allocation", "gptq", "block-reconstruction", "finite-set-ranges", "timestep-reduction")

    class Options(PassOptions):
        """Options of ``group-widths``. Without any of the budgets, mean bits are the recipe's ``act_bits``.

        Attributes:
            choices: widths of inputs.
            floating: offer floating point, too, in every group.
            float_bits: what floating point counts as.
            act_bits: limit on the mean bits of an input, over layers and steps; ``"plan"``: what the plan has.
            bitops: limit on the bit operations of a mean call, for the batch it was traced with.
            latency: limit on the total of the latency table for a mean call, in its unit.
            latency_table: measured time by layer and width: ``{"conv_in": {"W8A8": 0.8, "W8": 1.9}}``.
            solver: ``"exact"``, or for comparison ``"beam"`` or ``"greedy"``.
            beam: partial choices that beam search keeps.
            seconds: CP-SAT's deterministic time.
            probes: random probes of the final image.
            runs: recorded sampling runs used for it.
            where_possible: leave the plan as it is where no input is quantized, where ``act_bits="plan"`` and all have
                the widest of the choices, or where the recording holds no whole sampling runs; off: refuse, or solve.
        """

        choices: tuple[int, ...] = Field((4, 6, 8), min_length=1)
        floating: bool = False
        float_bits: int = Field(16, ge=1)
        act_bits: Annotated[float, Field(gt=0)] | Literal["plan"] | None = None
        bitops: float | None = Field(None, gt=0)
        latency: float | None = Field(None, gt=0)
        latency_table: dict[str, dict[str, float]] = Field(default_factory=dict)
        solver: Literal["exact", "beam", "greedy"] = "exact"
        beam: int = Field(64, ge=1)
        seconds: float = Field(20.0, gt=0)
        probes: int = Field(8, ge=1)
        runs: int = Field(2, ge=1)
        where_possible: bool = False

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Measure, solve, and write the quantizers.

        Raises:
            BudgetError: the budgets cannot be met; the message holds the nearest that can.
            CalibrationError: the recording holds no whole sampling run.
        """
        layers = [n for n, layer in plan.layers.items() if layer.activation and n in context.partition.layers]
        if self.options.where_possible and not self._leaves_a_choice(plan, layers):
            return
        if not layers:
            raise RecipeError("pass 'group-widths': no layer has a quantized input")
        runs = whole_runs(context, self.options.runs, required=not self.options.where_possible)
        if not runs:
            return
        found = activation_candidates(plan, context, layers, self.options.choices)
        count = len(plan.groups[DEFAULT_GROUPS])
        found = {n: {b: _in_groups(q, count) for b, q in widths.items()} for n, widths in found.items()}
        used = {quant.groups for widths in found.values() for quant in widths.values() if quant.groups is not None}
        transforms = {name: context.transforms[name] for name in layers if name in context.transforms}
        candidates = Candidates(
            {}, found, {name: plan.groups[name] for name in sorted(used)}, transforms, plan.row_orders
        )
        image = yield from candidate_errors(context, candidates, runs, self.options.probes, by_group=True)
        problem = GroupProblem(plan, context, candidates, image, self.options)
        yield Progress(0, 1, "solving")
        solution, others = self._solve(problem.program)
        solution.require()
        chosen = problem.widths(solution.choice)
        for name, widths in chosen.items():
            _write(plan.layers[name], candidates, name, widths)
        plan.sections[self.name] = Section.of(
            GroupWidthFindings(
                solution.status, solution.objective, solution.bound, *others, tuple(solution.uses), chosen
            )
        )
        yield Progress(1, 1)

    def _leaves_a_choice(self, plan: QuantPlan, layers: list[str]) -> bool:
        """Whether an input is quantized, and not all have the widest of the choices and may have it."""
        o, inputs = self.options, [plan.layers[name].activation for name in layers]
        free = (o.bitops, o.latency, o.act_bits) == (None, None, "plan")
        return any(not free or quant.narrowest < max(o.choices) for quant in inputs if quant)

    def _solve(self, program: DriftingProgram) -> tuple[Solution, tuple[float | None, float | None]]:
        o = self.options
        quick: dict[str, Choice | None] = {"greedy": greedy_drifting(program), "beam": beam_search(program, o.beam)}
        values = {name: None if choice is None else program.value(choice) for name, choice in quick.items()}
        others = values["greedy"], values["beam"]
        if o.solver == "exact":
            return solve_drifting(program, seconds=o.seconds, beam=o.beam), others
        linear = answer(program.linear, quick[o.solver], o.solver, 0.0)
        value = values[o.solver]
        uses, objective = linear.uses, np.inf if value is None else value
        return Solution(linear.status, linear.choice, objective, 0.0, uses, o.solver, nearest=linear.nearest), others


class GroupProblem:
    """The program of a plan, and what its columns mean.

    Args:
        plan: its weights' widths, roles and visited timesteps count.
        context: of the run.
        candidates: quantizers of inputs.
        image: what each does to the final image.
        options: choices and budgets.
    """

    def __init__(
        self,
        plan: QuantPlan,
        context: PassContext,
        candidates: Candidates,
        image: ImageError,
        options: GroupWidths.Options,
    ) -> None:
        self.plan, self.context, self.options = plan, context, options
        self.measured: dict[str, set[int]] = {}
        for entry in image.random:
            if isinstance(entry, GroupEntry):
                self.measured.setdefault(entry.layer, set()).add(entry.group)
        self.groups = {name: next(iter(each.values())).groups or "" for name, each in candidates.activations.items()}
        self.columns: list[tuple[Slot, int | None]] = []
        start, error, drift = [0], [], []
        directions = len(next(iter(image.drift.values())))
        for name in candidates.activations:
            for group in sorted(set(self._visits(name))):
                for width in self._choices(name):
                    entry = None if width is None else GroupEntry(name, "activation", width, group)
                    self.columns.append(((name, group), width))
                    error.append(0.0 if entry is None else image.random[entry])
                    drift.append((0.0,) * directions if entry is None else image.drift[entry])
                start.append(len(self.columns))
        names = tuple(dict.fromkeys(f"{name}, group {group}" for (name, group), _ in self.columns))
        linear = ChoiceProgram(names, np.array(start), np.array(error), tuple(self._budgets()))
        self.program = DriftingProgram(linear, np.array(drift))

    def _visits(self, name: str) -> list[int]:
        """Group of the layer's input at every step of sampling; of one that was not measured, its neighbour."""
        groups = self.plan.groups[self.groups[name]]
        visited = [groups.of(t) for t in self.plan.schedule.timesteps]
        return [min(self.measured[name], key=lambda known, g=g: (abs(known - g), known)) for g in visited]

    def _choices(self, name: str) -> tuple[int | None, ...]:
        least = self.context.targets.edge_bits if self.plan.layers[name].roles & EDGE_ROLES else 0
        choices = sorted(self.options.choices)
        wide: tuple[int | None, ...] = tuple(w for w in choices if w >= least) or (choices[-1],)
        return (*wide, None) if self.options.floating and not self.plan.layers[name].dynamic else wide

    def _budgets(self) -> Iterator[Budget]:
        o, partition = self.options, self.context.partition
        shares = {name: np.bincount(self._visits(name)) / len(self.plan.schedule) for name in self.groups}
        share = np.array([shares[name][group] for (name, group), _ in self.columns])  # [K]
        bits = np.array([o.float_bits if width is None else width for _, width in self.columns], dtype=np.float64)
        inputs = np.array([prod(partition.layers[name].input_shape) for (name, _), _ in self.columns], dtype=np.float64)
        mean = o.act_bits
        if (o.act_bits, o.bitops, o.latency) == (None, None, None):
            mean = self.context.targets.act_bits
        if mean is not None:
            sizes = {name: prod(partition.layers[name].input_shape) for name in self.groups}
            total = sum(size * (self._planned(name) if mean == "plan" else mean) for name, size in sizes.items())
            yield Budget("activation bits", share * inputs * bits, total * (1 + 1e-12), "bits")
        if o.bitops is not None:
            macs = [partition.layers[name].macs * self._weight_bits(name) for (name, _), _ in self.columns]
            yield Budget("BitOps", share * bits * np.array(macs, dtype=np.float64), o.bitops, "BitOps")
        if o.latency is not None:
            table = {n: {Width.parse(w): ms for w, ms in times.items()} for n, times in o.latency_table.items()}
            times = [time_of(table, name, self._width(name, width)) for (name, _), width in self.columns]
            yield Budget("latency", share * np.array(times), o.latency, "ms")

    def _planned(self, name: str) -> float:
        """Mean bits that the plan has for the layer's input, over the steps of sampling."""
        quant, schedule = self.plan.layers[name].activation, self.plan.schedule
        assert quant is not None
        if quant.groups is None:
            return quant.bits
        visited = [
            quant.widths[self.plan.groups[quant.groups].of(t)] or self.options.float_bits for t in schedule.timesteps
        ]
        return sum(visited) / len(visited)

    def _width(self, name: str, activation: int | None) -> Width:
        weight = self.plan.layers[name].weight
        return Width(None if weight is None else weight.bits, activation)

    def _weight_bits(self, name: str) -> int:
        weight = self.plan.layers[name].weight
        return self.options.float_bits if weight is None else weight.bits

    def widths(self, choice: Choice) -> dict[str, tuple[int | None, ...]]:
        """Width in each group by layer, from chosen columns; groups that were not measured have their neighbour's."""
        found: dict[str, dict[int, int | None]] = {}
        for column in choice:
            (name, group), width = self.columns[int(column)]
            found.setdefault(name, {})[group] = width
        count = {name: len(self.plan.groups[groups]) for name, groups in self.groups.items()}
        return {
            name: tuple(
                by_group[min(by_group, key=lambda known, g=g: (abs(known - g), known))] for g in range(count[name])
            )
            for name, by_group in found.items()
        }


def _in_groups(quant: InputQuant, count: int) -> InputQuant:
    """A candidate of one width as it is in the groups: dynamic ranges are told which."""
    if isinstance(quant, ActivationQuant):
        return quant
    each = {"group_bits": (quant.bits,) * count, "group_clips": (quant.clip,) * count}
    return replace(quant, clip=1.0, groups=DEFAULT_GROUPS, **each)


def _write(layer: LayerPlan, candidates: Candidates, name: str, widths: tuple[int | None, ...]) -> None:
    """Put the quantizers of some widths into the entry of a layer."""
    bits = [width for width in widths if width is not None]
    if not bits:
        layer.activation = None
        layer.unquantized_reason = Reason("group-widths leaves its input in floating point at every step", "allocated")
        return
    widest = max(bits)
    if isinstance(layer.activation, DynamicActivationQuant):
        quants: Any = candidates.activations[name]
        layer.activation = layer.activation.in_groups(DEFAULT_GROUPS, [quants[width].forms[0] for width in bits])
        return
    quants: Mapping[int, ActivationQuant] = candidates.activations[name]  # type: ignore[assignment]
    tables = [quants[widest if width is None else width] for width in widths]
    scale, zero_point = (
        torch.stack([getattr(quant, part)[g] for g, quant in enumerate(tables)]) for part in ("scale", "zero_point")
    )
    group_bits = widths if len(set(widths)) > 1 else None
    layer.activation = ActivationQuant(widest, quants[widest].groups, scale, zero_point, group_bits)
