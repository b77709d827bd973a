"""The differentiable group search of pass ``timestep-groups``: what it starts from, what it minimises, what it decides.

Shapes: ``T`` timesteps, ``G`` groups, ``L`` layers, ``Q`` sets of groups (1 or L).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from dq_plugins.artifact import UnitResults
from dq_plugins.errors import RecipeError
from dq_plugins.observers.error import ErrorTable
from dq_plugins.observers.grouping import optimal_groups
from dq_plugins.passes.activations import DEFAULT_GROUPS, statistics
from dq_plugins.passes.ranges.search.decide import decided, labels_from_starts, learned_groups, merged
from dq_plugins.passes.ranges.search.learn import STATE, GroupLoss, LearnedGroups, learn_groups
from dq_plugins.passes.ranges.search.output import OutputLoss
from dq_plugins.passes.ranges.search.points import PointsLoss, representative
from dq_plugins.passes.ranges.search.relaxation import Relaxation, best_ranges, spread_ranges, start_logits
from dq_plugins.plan import QuantPlan
from dq_plugins.progress import Progress, reported
from dq_plugins.quantized.reconstruction_units import find_units
from dq_plugins.recipe import PassContext, PassOptions

Tables = Mapping[str, ErrorTable]
SEARCH, RANGES_AGAIN = "search", "search, ranges of least error"
ROUNDS = {"input": 200, "layer": 16, "block": 16, "denoiser": 16}


class SearchOptions(PassOptions):
    """Options of the method ``search``; the other methods ignore all but ``groups`` and ``shared``.

    Attributes:
        groups: number of groups; a schedule with fewer timesteps has one each.
        shared: one set of groups for all layers; off: each layer has its own.
        start: ``"dp"``, the groups of the exact dynamic program, or ``"scratch"``.
        contiguous: groups are runs of timesteps; off: any timesteps may share ranges.
        loss: whose error is minimised: the quantized inputs of the layers (``"input"``, from statistics alone), the
            outputs of layers, of blocks, or of the whole denoiser.
        rounds: how often each timestep is visited; None: 200 for inputs, 16 for outputs.
        images: samples of a call that an iteration runs.
        entropy: weight of the entropy (0.8 is the paper's).
        entropy_scale: what the loss is divided by: the error that one static range makes (``"static"``), the power of
            the full-precision signal (``"signal"``), or nothing, the error being summed over each image
            (``"absolute"``, the paper's).
        merge: groups are joined while the summed error of the activations rises by no more than this share.
        keep_better: compare with ranges of least error in the same groups, and with the dynamic program's and uniform
            groups, on recorded images that nothing was learned from, and keep the best; off: what was learned.
    """

    groups: int = Field(8, ge=1)
    shared: bool = True
    start: Literal["dp", "scratch"] = "dp"
    contiguous: bool = True
    loss: Literal["input", "layer", "block", "denoiser"] = "denoiser"
    rounds: int | None = Field(None, ge=1)
    images: int = Field(2, ge=1)
    entropy: float = Field(0.8, ge=0)
    entropy_scale: Literal["static", "signal", "absolute"] = "static"
    merge: float = Field(0.01, ge=0)
    keep_better: bool = True


class FoundGroups(NamedTuple):
    """What a search decided.

    Attributes:
        labels: group of each timestep ``[T]``, by name of the groups.
        ranges: clip bounds ``low`` and ``high``, each ``[G]``, by layer, where the learned ones are kept.
        report: findings for the plan's section.
    """

    labels: dict[str, Tensor]
    ranges: dict[str, tuple[Tensor, Tensor]]
    report: dict[str, Any]


class GroupSearch:
    """One search.

    Args:
        plan: with the weights that the searched activations will meet.
        context: the run.
        bits: width of every layer's input.
        tables: error tables of the same layers, in the order of the search.
        options: the rest.
    """

    def __init__(
        self, plan: QuantPlan, context: PassContext, bits: Mapping[str, int], tables: Tables, options: SearchOptions
    ) -> None:
        self.plan, self.context, self.options, self.tables = plan, context, options, tables
        self.bits = {name: bits[name] for name in tables}
        self.symmetric = context.targets.symmetric_acts
        self.steps = len(context.calibration.timesteps)
        self.groups = min(options.groups, self.steps)
        self.rounds = options.rounds or ROUNDS[options.loss]

    def run(self) -> Generator[Progress, None, FoundGroups]:
        """Search, decide, compare; the generator returns what was found."""
        yield Progress(0, 1, "search: recorded outputs")
        loss = self._loss()
        scale, relaxation = self._scale(loss), self._start()
        kept = UnitResults(STATE, self.context.workdir, self._settings())
        learning = learn_groups(relaxation, loss, self.rounds, self.options.entropy, scale=scale, kept=kept)
        total = self.rounds * loss.per_round
        what = f"{self.groups} groups, {self.options.loss} loss"
        learned = yield from reported(learning, lambda iteration: Progress(iteration, total, what))
        yield Progress(total, total, "comparing with the dynamic program's groups")
        return self._decide(learned, relaxation, loss)

    def _decide(self, learned: LearnedGroups, relaxation: Relaxation, loss: GroupLoss) -> FoundGroups:
        rows = [decided(w, contiguous=self.options.contiguous) for w in learned.weights]
        labels = torch.stack([merged(row, self._tables_of(i), self.options.merge) for i, row in enumerate(rows)])
        ranges = self._learned_ranges(labels, learned.weights, relaxation)
        candidates, errors = {SEARCH: labels}, {SEARCH: _judged(labels, ranges, loss)}
        if self.options.keep_better:
            candidates |= {RANGES_AGAIN: labels, "dp": self._optimal(), "uniform": self._uniform()}
            errors |= {name: self._error(each, loss) for name, each in candidates.items() if name != SEARCH}
        kept = min(errors, key=errors.__getitem__)
        names = [DEFAULT_GROUPS] if self.options.shared else list(self.tables)
        report = {
            "kept": kept,
            "error": errors,
            "entropy": learned.entropy,
            "top_weight": learned.top_weight,
            "mixture_error": learned.mixture_loss,
            "argmax_error": learned.hard_loss,
        }
        by_layer = dict(zip(self.tables, zip(*ranges, strict=True), strict=True)) if kept == SEARCH else {}
        return FoundGroups(dict(zip(names, candidates[kept], strict=True)), by_layer, report)

    @torch.no_grad()
    def _learned_ranges(self, labels: Tensor, weights: Tensor, relaxation: Relaxation) -> tuple[Tensor, Tensor]:
        """Clip bounds that were learned for decided groups ``[Q, T]``: ``low`` and ``high``, each ``[L, G]``."""
        count = int(labels.max()) + 1
        found = [learned_groups(row, each) for row, each in zip(labels, weights, strict=True)]
        source = torch.stack([torch.nn.functional.pad(g, (0, count - len(g))) for g in found])  # [Q, G]
        source = source.expand(len(self.tables), -1)
        low, high = (end.gather(1, source) for end in relaxation.ranges())
        return low, high

    def _tables_of(self, row: int) -> Tables:
        """Tables of the layers that share a set of groups."""
        if self.options.shared:
            return self.tables
        name = list(self.tables)[row]
        return {name: self.tables[name]}

    def _loss(self) -> GroupLoss:
        o, context = self.options, self.context
        if o.entropy_scale == "absolute" and o.loss != "denoiser":
            raise RecipeError(
                f"timestep-groups: entropy_scale='absolute' is the error of an image, which loss={o.loss!r} has none "
                "of; take loss='denoiser', or another scale"
            )
        if o.loss == "input":
            return self._points_loss()
        generator = context.generator("order")
        order = [i for _ in range(self.rounds) for i in torch.randperm(self.steps, generator=generator).tolist()]
        units = {
            "layer": tuple(self.bits),
            "block": tuple(unit.module for unit in find_units(context.partition, self.bits)),
            "denoiser": ("",),
        }[o.loss]
        return OutputLoss(
            context.denoiser,
            self.plan,
            context.calibration,
            self.bits,
            units=units,
            symmetric=self.symmetric,
            order=order,
            argument=context.partition.sample_argument,
            images=o.images,
        )

    def _points_loss(self) -> PointsLoss:
        found = statistics(self.context, tuple(sorted(self.bits)))
        points = [[representative(*found.points(n, i)) for i in range(self.steps)] for n in self.bits]
        values, weights = (torch.stack([torch.stack([p[k] for p in row]) for row in points]) for k in (0, 1))
        return PointsLoss(values, weights, list(self.bits.values()), symmetric=self.symmetric)

    def _scale(self, loss: GroupLoss) -> float:
        """What the loss is divided by, see `SearchOptions.entropy_scale`."""
        if self.options.entropy_scale == "signal":
            return 1.0
        if isinstance(loss, OutputLoss) and self.options.entropy_scale == "absolute":
            return 1.0 / (loss.power[""] * loss.elements)
        return max(self._error(torch.zeros((1, self.steps), dtype=torch.int64), loss), 1e-30)

    def _error(self, labels: Tensor, loss: GroupLoss) -> float:
        """Loss with given groups ``[Q, T]``, each with its best candidate ranges."""
        groups = int(labels.max()) + 1
        return _judged(labels, best_ranges(labels, self.tables, groups), loss)

    def _start(self) -> Relaxation:
        shape = (1 if self.options.shared else len(self.tables), self.steps, self.groups)
        labels = self._optimal() if self.options.start == "dp" else None
        if labels is None:
            ranges = spread_ranges(self.tables, self.groups)
        else:
            ranges = best_ranges(labels, self.tables, self.groups)
        return Relaxation(start_logits(shape, labels, self.context.generator("start")), *ranges)

    def _optimal(self) -> Tensor:
        """The dynamic program's groups, ``[Q, T]``."""
        timesteps = self.context.calibration.timesteps
        apart = [self.tables] if self.options.shared else [{name: table} for name, table in self.tables.items()]
        found = [optimal_groups(tables, timesteps) for tables in apart]
        return torch.stack([labels_from_starts(g.starts[self.groups - 1], self.steps) for g in found])

    def _uniform(self) -> Tensor:
        starts = [round(g * self.steps / self.groups) for g in range(1, self.groups)]
        row = labels_from_starts(starts, self.steps)
        return row.expand(1 if self.options.shared else len(self.tables), -1)

    def _settings(self) -> dict[str, Any]:
        """What the search depends on."""
        return {
            "plan": self.plan.hash,
            "calibration": self.context.calibration.hash,
            "seed": self.context.seed,
            "options": self.options,
            "bits": self.bits,
        }


def _judged(labels: Tensor, ranges: tuple[Tensor, Tensor], loss: GroupLoss) -> float:
    """Loss of given groups ``[Q, T]`` and clip bounds, each ``[L, G]``, on what was not learned from."""
    groups = ranges[0].shape[1]
    fixed = Relaxation(torch.zeros(1, 1, groups), *ranges)
    return loss.judge(torch.nn.functional.one_hot(labels, groups).float(), fixed)
