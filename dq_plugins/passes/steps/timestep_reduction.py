"""Pass ``timestep-reduction``: fewer timesteps, and with them the bits, chosen together.

Sampling visits one timestep of each interval; the schedule, and the widths if the pass ``sensitivity`` has run, are
those whose images come closest to the recorded full-precision ones within a budget of steps times cost of a step. An
exact program proposes, an evolutionary search looks further, and what measures best goes into the plan.

Source: TMPQ-DM (Sun et al. 2024); the exact program and its costs are ours.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from dq_plugins.passes.allocation.problem import LatencyTable, time_of
from dq_plugins.passes.steps.baselines import Point, draw, uniform
from dq_plugins.passes.steps.fitness import SamplingFitness
from dq_plugins.passes.steps.intervals import step_intervals, thinned
from dq_plugins.passes.steps.joint import JointOptions, JointSearch
from dq_plugins.passes.steps.runs import Run, runs_of, split_runs
from dq_plugins.passes.steps.space import LayerChoices, Space
from dq_plugins.passes.steps.stepper import Stepper
from dq_plugins.passes.steps.supernet import LEARNED, CalibrationOptions, calibrate
from dq_plugins.passes.steps.transitions import END, Transitions, measure_transitions
from dq_plugins.passes.width_candidates import candidates_of, write_widths
from dq_plugins.plan import QuantPlan, Section
from dq_plugins.quantized.candidates import Candidates, Entry
from dq_plugins.quantized.exact_tokens import install_tokens
from dq_plugins.quantized.layer_transform import transform_of
from dq_plugins.quantized.resuming import STATE
from dq_plugins.quantized.width import Width
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.sensitivity.sensitivity_table import SensitivityTable
from dq_plugins.timesteps import Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Setting:
    """What the search works on.

    Attributes:
        stepper: the sampler.
        runs: recorded runs.
        grid: candidate timesteps, ascending.
        candidates: quantizers of every layer that has one.
        noise: noise power of every entry; 0 when widths are not searched.
        transitions: costs of steps, if they were measured.
    """

    stepper: Stepper
    runs: list[Run]
    grid: tuple[float, ...]
    candidates: Candidates
    noise: Mapping[Entry, float]
    transitions: Transitions | None


@dataclass(frozen=True)
class ReductionFindings:
    """What the search found.

    Attributes:
        chosen_by: ``"exact"`` or ``"evolution"``.
        cost: of a sampling run.
        budget: its limit.
        unit: of both.
        loss: distance of the images to full precision.
        losses: of the answer of each search.
        fitness: metric.
        exact: how the program went.
        evolution: how the search went.
        points: by rule, one at each budget of the sweep.
    """

    chosen_by: str
    cost: float
    budget: float
    unit: str
    loss: float
    losses: dict[str, float]
    fitness: str
    exact: dict[str, Any] | None
    evolution: dict[str, Any] | None
    points: dict[str, tuple[Point, ...]]


class TimestepReduction(Pass):
    """Choose fewer timesteps of sampling, and the widths with them."""

    name = "timestep-reduction"
    after = ("timestep-groups", "activation-ranges", "bos-tokens", "sensitivity")

    class Options(JointOptions):
        """Options of ``timestep-reduction``; those of the searches are `JointOptions` and `EvolutionOptions`.

        Attributes:
            steps: numbers of steps to choose from; the first sets the default budget. By default half as many as
                recorded.
            budget: limit on steps times cost of a step, in the unit of the costs. By default the cost of the first of
                ``steps`` at the recipe's widths.
            latency_table: measured time by layer and width, ``{"conv_in": {"W8A8": 0.8}}``; costs are BitOps without.
            call_latency: with such a table, time of a denoiser call outside its layers.
            spacing: ``"quadratic"`` (the paper's), ``"uniform"``, or ``"change"`` (equal change of the trajectory).
            grid: recorded timesteps to choose from, at most; they are thinned out evenly.
            fitness: registered metric of the images.
            features: ``package.module:attribute`` of a network whose features are compared instead.
            images: images that each rung of the search looks at, as shares of those it sees.
            held_out: share of the recorded images that the searches do not see and their answers are compared on; none
                of fewer than eight.
            probes: backward passes through each recorded run, for the costs of steps.
            calibration: ``"ranges"`` takes the quantizers as they are; ``"random"`` (the paper's) and
                ``"independent"`` learn them block by block, see `dq_plugins.passes.steps`.
            iterations: of learning, for each block.
            sweep: budgets, as multiples of the budget, each with a search of its own, compared with the baselines.
        """

        steps: tuple[int, ...] = ()
        budget: float | None = Field(None, gt=0)
        latency_table: dict[str, dict[str, float]] = Field(default_factory=dict)
        call_latency: float = Field(0.0, ge=0)
        spacing: Literal["quadratic", "uniform", "change"] = "quadratic"
        grid: int = Field(50, ge=1)
        fitness: str = "mse"
        features: str | None = None
        images: tuple[float, ...] = Field((0.25, 1.0), min_length=1)
        held_out: float = Field(0.25, ge=0, lt=1)
        probes: int = Field(2, ge=1)
        calibration: Literal["ranges", "random", "independent"] = "ranges"
        iterations: int = Field(400, ge=1)
        sweep: tuple[float, ...] = ()

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Search, and write the schedule and the widths into the plan.

        Raises:
            BudgetError: nothing fits the budget, or more steps are asked for than were recorded.
            TimestepError: the recorded sampler takes no custom timesteps.
        """
        with install_tokens(context.denoiser, plan):
            setting = yield from self.setting(plan, context)
            search = self.search(plan, context, setting)
            found = yield from search.run()
            points = (yield from search.front(self.options.sweep, found)) if self.options.sweep else {}
        space, best = search.space, found.best
        plan.sampling = Schedule(space.timesteps(best.candidate))
        if plan.sensitivity is not None:
            write_widths(plan, space.widths(best.candidate), setting.candidates)
        plan.sections[self.name] = Section.of(
            ReductionFindings(
                chosen_by=found.chosen_by,
                cost=space.cost(best.candidate),
                budget=space.budget,
                unit=space.unit,
                loss=best.loss,
                losses={name: each.loss for name, each in found.scored.items()},
                fitness=self.options.fitness,
                exact=None if found.solution is None else found.solution.as_data(setting.transitions),
                evolution=None if found.state is None else found.state.summary(),
                points={rule: tuple(each) for rule, each in points.items()},
            )
        )

    @classmethod
    def figure(cls, plan: QuantPlan) -> tuple[Figure, str] | None:
        """Error against cost, the plan marked, if the option ``sweep`` asked for it."""
        section = plan.sections.get(cls.name)
        found = None if section is None else section.read(ReductionFindings, cls.name)
        if found is None or not found.points:
            return None
        figure = draw(found.points, f"cost of a sampling run, {found.unit}", (found.cost, found.loss))
        return figure, "Error against cost; numbers are steps."

    def setting(self, plan: QuantPlan, context: PassContext) -> Generator[Progress, None, Setting]:
        """What the search works on, measured; iterate to run, the generator returns it."""
        o = self.options
        stepper, runs = runs_of(context.calibration, context.partition.sample_argument)
        grid = thinned(tuple(t for t in context.calibration.schedule.sorted if t > stepper.end), o.grid)
        transitions = None
        if o.search != "evolution" or o.spacing == "change":
            generator = context.generator("transitions")
            transitions = yield from measure_transitions(
                context.denoiser, stepper, runs, grid, probes=o.probes, generator=generator
            )
        measured = plan.sensitivity
        if measured is None:
            candidates = kept_widths(plan)
            noise = dict.fromkeys(candidates.entries(), 0.0)  # there is nothing to choose
            return Setting(stepper, runs, grid, candidates, noise, transitions)
        candidates = candidates_of(plan, context, measured.weight_choices, measured.act_choices)
        if o.calibration != "ranges":
            settings = CalibrationOptions(o.calibration, iterations=o.iterations, seed=context.stream("calibration"))
            candidates = yield from calibrate(
                context.denoiser,
                candidates,
                context.calibration,
                context.partition,
                settings,
                context.finished(LEARNED, plan, o),
                context.finished(STATE, plan, o),
            )
        errors = SensitivityTable.of(measured).errors
        return Setting(stepper, runs, grid, candidates, as_noise(errors, transitions), transitions)

    def space(self, plan: QuantPlan, context: PassContext, setting: Setting) -> Space:
        """The search space that the options describe."""
        o = self.options
        counts = o.steps or (max(len(context.calibration.schedule) // 2, 1),)
        bounds = max(setting.stepper.end, 0.0), setting.grid[-1] + 1
        change = setting.transitions.change() if o.spacing == "change" and setting.transitions else None
        intervals = {k: step_intervals(setting.grid, k, o.spacing, bounds=bounds, change=change) for k in counts}
        latency = {n: {Width.parse(w): ms for w, ms in times.items()} for n, times in o.latency_table.items()}
        choices = layer_choices(setting.candidates, context, latency)
        unit, overhead = ("ms", o.call_latency) if latency else ("BitOps", 0.0)
        unlimited = Space(intervals, choices, float("inf"), unit, overhead)
        target = uniform(unlimited, Width(context.targets.weight_bits, context.targets.act_bits))
        own = counts[0] * unlimited.call_cost(target)
        return replace(unlimited, budget=own if o.budget is None else o.budget)

    def search(self, plan: QuantPlan, context: PassContext, setting: Setting) -> JointSearch:
        """The search that the options describe."""
        o = self.options
        recorded = sum(run.images for run in setting.runs)
        total = recorded - (round(o.held_out * recorded) if recorded >= 8 else 0)
        seen, others = split_runs(setting.runs, total)
        fitness = SamplingFitness(
            context.denoiser,
            setting.candidates,
            context.calibration.timestep_argument,
            self.space(plan, context, setting),
            seen,
            setting.stepper,
            tuple(sorted({max(round(share * total), 1) for share in o.images})),
            o.fitness,
            o.features,
        )
        scores_depend_on = o.model_dump(
            mode="json", include={"steps", "spacing", "fitness", "features", "images", "held_out"}
        )
        signature = [context.calibration.hash, setting.candidates.hash, scores_depend_on, setting.grid]
        folder = context.workdir and context.workdir / "search"
        seed = context.stream("evolution")
        judged = replace(fitness, runs=others, images=(recorded - total,)) if others else None
        return JointSearch(fitness, setting.noise, setting.transitions, o, folder, signature, seed, judged)


def as_noise(errors: Mapping[Entry, float], transitions: Transitions | None) -> Mapping[Entry, float]:
    """Errors of the final image as the noise power of the output that leads to them over all recorded steps.

    The joint program carries noise to the image step by step; entries that drift count for more noise than they make.
    Noise powers come out in another unit, which its scale takes away again.
    """
    if transitions is None:
        return errors
    nodes = len(transitions.nodes)
    gain = sum(transitions.gain(node, node - 1 if node else END) for node in range(nodes))
    return {entry: error / gain for entry, error in errors.items()} if gain > 0 else errors


def kept_widths(plan: QuantPlan) -> Candidates:
    """The quantizers that a plan has, as choices of one: for a search that leaves widths alone."""
    weights = {n: {p.weight.bits: p.weight} for n, p in plan.layers.items() if p.weight is not None}
    inputs = {n: {p.activation.bits: p.activation} for n, p in plan.layers.items() if p.activation is not None}
    transforms = {n: t for n, p in plan.layers.items() if p.quantized and (t := transform_of(p)) is not None}
    return Candidates(weights, inputs, dict(plan.groups), transforms, plan.row_orders)


def layer_choices(candidates: Candidates, context: PassContext, latency: LatencyTable) -> tuple[LayerChoices, ...]:
    """Choices of all layers with candidates, cheapest widths first, with the cost of one denoiser call.

    Costs are measured times, or where ``latency`` is empty BitOps for the batch that was recorded.

    Raises:
        BudgetError: the latency table lacks a layer or a width.
    """
    choices = []
    for name in candidates.layers:
        weights: tuple[int | None, ...] = tuple(sorted(candidates.weights.get(name, {}))) or (None,)
        inputs: tuple[int | None, ...] = tuple(sorted(candidates.activations.get(name, {}))) or (None,)
        cost = np.empty((len(weights), len(inputs)))
        for i, w in enumerate(weights):
            for j, a in enumerate(inputs):
                cost[i, j] = time_of(latency, name, Width(w, a)) if latency else _bitops(context, name, w, a)
        choices.append(LayerChoices(name, weights, inputs, cost))
    return tuple(choices)


def _bitops(context: PassContext, name: str, weight: int | None, activation: int | None) -> float:
    full = 8 * context.denoiser.get_submodule(name).weight.element_size()  # type: ignore[union-attr, operator]
    return float(context.partition.layers[name].macs * (weight or full) * (activation or full))
