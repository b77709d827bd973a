"""Pass ``learned-ranges``: clip ranges of given groups, learned against what they do to outputs.

    L = mean (y - y^)^2          y: the output of a block, or of the denoiser, in recorded calls

A range that is good for a layer's own input need not be good for what comes out: it counts which values matter later.
Against the denoiser's output everything that is learned moves together; blocks go one after the other, each on the
inputs that the quantized denoiser gives it. What is learned is judged on images (of blocks: calls) that nothing was
learned from, and thrown away where it is no better there. Against the denoiser's output every image counts by the share
of its error that is taken away (`dq_plugins.quantized.denoiser_loss`), and in the end recorded sampling runs are
repeated: what does not make their images better is thrown away as well.

With the ranges may be learned: the scales of weights whose codes are settled, the corrections of outputs, and the
rounding itself.

Source: Esser et al. 2020 (LSQ), Bhalgat et al. 2020 (LSQ+), for given weights as in Chen et al. 2024 (EfficientQAT).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from dq_plugins.artifact import Format
from dq_plugins.passes.image_errors import image_errors, whole_runs
from dq_plugins.plan import InputQuant, QuantPlan, Section
from dq_plugins.progress import Progress, reported
from dq_plugins.quantized.block_learning import block_recorder, learn_block
from dq_plugins.quantized.denoiser_loss import LEAST, DenoiserLoss
from dq_plugins.quantized.learned_values import LearnedUnit, PlannedVariables, What
from dq_plugins.quantized.learner import Learner, Verdict
from dq_plugins.quantized.offset_rounding import SignSteps
from dq_plugins.quantized.reconstruction_units import find_units
from dq_plugins.quantized.resuming import STATE, resumable
from dq_plugins.quantized.run import QuantizedRun, planned_run, planned_states
from dq_plugins.recipe import Pass, PassContext, PassOptions

SHOWN_EVERY = 10  # iterations


UNIT: Format[LearnedUnit] = Format("learned-ranges", 1, LearnedUnit, what="learned ranges")


class LearnedRanges(Pass):
    """Learn ranges, weight scales and corrections against recorded outputs."""

    name = "learned-ranges"
    requires = ("activation-ranges",)
    after = (
        "bit-allocation",
        "weight-group-sizes",
        "timestep-reduction",
        "gptq",
        "block-reconstruction",
        "exempt-layers",
        "group-widths",
        "finite-set-ranges",
    )

    class Options(PassOptions):
        """Options of ``learned-ranges``.

        Attributes:
            target: whose error counts: the denoiser's output (``"denoiser"``), or that of each block (``"block"``).
            learn: what is learned: ``"ranges"`` (of dynamic ones the share of the extremes at which an input is
                cut off), ``"scales"`` of weights, ``"corrections"`` of outputs, ``"rounding"``
                of weights.
            most_bits: wider inputs keep their ranges; other things are learned at any width.
            passes: how often every recorded image is seen, about.
            images: images of a call that an iteration sees, of the denoiser; a block sees a whole call.
            learning_rate: of the first iteration, see `dq_plugins.quantized.variables`; it falls linearly.
            rounding_rate: likewise, of rounding, see `dq_plugins.quantized.offset_rounding`.
            looks: times that what is learned is judged on the way.
            calls: recorded calls that count, spread evenly over the recording.
            runs: recorded sampling runs that are repeated in the end, where the recording holds whole ones: what was
                learned against the denoiser's output must make their images better as well. 0: none.
        """

        target: Literal["denoiser", "block"] = "denoiser"
        learn: tuple[What, ...] = Field(("ranges",), min_length=1)
        most_bits: int = Field(16, ge=2, le=16)
        passes: float = Field(4.0, gt=0)
        images: int = Field(1, ge=1)
        learning_rate: float = Field(5e-3, gt=0)
        rounding_rate: float = Field(1e-3, gt=0)
        looks: int = Field(6, ge=1)
        calls: int = Field(10_000, ge=1)
        runs: int = Field(2, ge=0)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Learn and judge; what is finished is not learned again after an interruption."""
        layers = [n for n, layer in plan.layers.items() if layer.quantized and n in context.partition.layers]
        if not any(plan.layers[name].activation for name in layers) and self.options.learn == ("ranges",):
            return
        learn = self._denoiser if self.options.target == "denoiser" else self._blocks
        losses = yield from learn(plan, context, layers)
        if "ranges" in self.options.learn:
            plan.learned_ranges |= {n for n in layers if self._learns(plan.layers[n].activation)}
        plan.sections[self.name] = Section({"losses": losses})

    def _denoiser(
        self, plan: QuantPlan, context: PassContext, layers: list[str]
    ) -> Generator[Progress, None, dict[str, Any]]:
        o = self.options
        finished, kept = context.finished(UNIT, plan, o), context.finished(STATE, plan, o)
        unit = finished.find("denoiser")
        if unit is None:
            run = planned_run(context.denoiser, plan, whole=True)
            states, calls = planned_states(run, plan), context.calibration.spread(o.calls)
            argument, generator = context.partition.sample_argument, context.generator("order")
            with run:
                loss = DenoiserLoss(run, calls, argument, states, o.images, generator)
            planned = self._variables(run, plan, layers, method := self._method(o.passes * loss.per_pass))
            learner = Learner(
                planned.variables,
                lambda values, i: loss.learn(planned.states(states, values), i),
                method,
                judge=lambda values, i: loss.judge(planned.states(states, values), i),
                probes=loss.probes,
                start=torch.ones(loss.probes, dtype=torch.float64),  # errors are counted over those before learning
            )

            def progress(done: int) -> Progress | None:
                return None if done % SHOWN_EVERY else Progress(done, method.iterations, "the denoiser's output")

            with run:
                unit = LearnedUnit.of((yield from reported(resumable(learner, kept, "denoiser"), progress)))
            if unit.values and o.runs:
                unit = yield from self._by_images(plan, context, unit)
            finished.keep("denoiser", unit)
        kept.forget("denoiser")
        unit.write(plan, context.denoiser)
        return {"denoiser": unit.losses}

    def _by_images(
        self, plan: QuantPlan, context: PassContext, unit: LearnedUnit
    ) -> Generator[Progress, None, LearnedUnit]:
        """The same, or nothing learned where repeated sampling runs do not get better images by it.

        Errors of single calls do not say what becomes of them on the way to the image: what took 4 % away of those made
        images of the digits at W4A4 a quarter worse. Images count by the share of their own error.
        """
        runs = whole_runs(context, self.options.runs, required=False)
        yield Progress(0, 2, "repeated sampling runs")
        before = image_errors(plan, context, runs)
        if not bool(before.any()):  # no whole run, or calls that do not make up a sampling run
            return unit
        learned = replace(plan, layers={name: replace(layer) for name, layer in plan.layers.items()})
        unit.write(learned, context.denoiser)
        yield Progress(1, 2, "repeated sampling runs")
        before, after = (each.clamp(min=LEAST).log() for each in (before, image_errors(learned, context, runs)))
        verdict = Verdict(before, after)
        share = math.exp(verdict.learned_loss - verdict.start_loss)
        losses = {**unit.losses, "images": share, "kept_start": verdict.kept_start}
        return LearnedUnit(losses, {} if verdict.kept_start else unit.values)

    def _blocks(
        self, plan: QuantPlan, context: PassContext, layers: list[str]
    ) -> Generator[Progress, None, dict[str, Any]]:
        run, units = planned_run(context.denoiser, plan), find_units(context.partition, layers)
        states, finished = planned_states(run, plan), context.finished(UNIT, plan, self.options)
        kept = context.finished(STATE, plan, self.options)
        calls, losses = context.calibration.spread(self.options.calls), {}
        method = self._method(self.options.passes * len(calls))
        with block_recorder(units, context.partition, calls, context.workdir) as recorder:
            for done, each in enumerate(units):
                planned = self._variables(run, plan, each.layers, method)
                if not planned.variables:
                    continue
                unit = finished.find(each.module)
                if unit is None:
                    with run:
                        cache = recorder.record(run, each, lambda states=states: states)
                        learning = learn_block(planned, cache, states, method, context.generator(each.module), kept)
                        show = partial(_shown, done, len(units), each.module)
                        unit = LearnedUnit.of((yield from reported(learning, show)))
                    finished.keep(each.module, unit)
                kept.forget(each.module)
                unit.write(plan, context.denoiser)
                states |= planned_states(run, plan, each.layers)
                losses[each.module] = unit.losses
                yield Progress(done + 1, len(units), each.module)
        return losses

    def _learns(self, quant: InputQuant | None) -> bool:
        return quant is not None and quant.bits <= self.options.most_bits

    def _method(self, iterations: float) -> SignSteps:
        return SignSteps(max(round(iterations), 1), self.options.rounding_rate, self.options.looks)

    def _variables(
        self, run: QuantizedRun, plan: QuantPlan, layers: Iterable[str], method: SignSteps
    ) -> PlannedVariables:
        o = self.options
        rate = o.learning_rate / o.rounding_rate
        return PlannedVariables(run, plan, layers, o.learn, method, rate=rate, most_bits=o.most_bits)


def _shown(done: int, total: int, what: str, iteration: int) -> Progress | None:
    return None if iteration % SHOWN_EVERY else Progress(done, total, f"{what} {iteration}")
