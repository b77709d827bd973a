"""Pass ``block-reconstruction``: learn the rounding of every block against its own full-precision output.

    L = mean over positions of  sum over channels (y - y^)^2

Blocks go one after the other, in execution order; each sees the inputs that the already quantized denoiser gives it.
Weights start from the codes that they have (``gptq``'s, say), or from the nearest ones.
Layers of the temporal block are frozen: they are neither optimised nor regularised here. So are layers that mix t
with conditions, once ``temporal-reconstruction`` has decided their rounding.

Source: BRECQ (Li et al. 2021) and Q-Diffusion (Li et al. 2023); the freezing is TFMQ-DM's (Huang et al. 2024).
"""

from __future__ import annotations

import resource
import time
from collections.abc import Generator, Iterator
from typing import ClassVar

from pydantic import Field

from dq_plugins.artifact import Format, UnitResults
from dq_plugins.layer_kinds import LAYER_KINDS
from dq_plugins.plan import LayerPlan, QuantPlan, Section
from dq_plugins.progress import Progress, reported
from dq_plugins.quantized.block_cache import BlockCache, BlockRecorder
from dq_plugins.quantized.block_learning import block_recorder, learn_block
from dq_plugins.quantized.learned_values import Key, LearnedUnit, PlannedVariables, What
from dq_plugins.quantized.learner import Learned, LearnerState
from dq_plugins.quantized.reconstruction_units import Unit, find_units
from dq_plugins.quantized.resuming import NOTHING_KEPT, STATE
from dq_plugins.quantized.rounding_methods import MethodName, rounding_method
from dq_plugins.quantized.rounding_variables import RoundingMethod
from dq_plugins.quantized.run import QuantizedRun, States, planned_run, planned_states, sees_quantized_inputs
from dq_plugins.recipe import Pass, PassContext, PassOptions

SHOWN_EVERY = 20  # iterations


BLOCK: Format[LearnedUnit] = Format("reconstructed-block", 1, LearnedUnit, what="a reconstructed block")


class BlockReconstruction(Pass):
    """Learn the rounding of weights, block by block, against recorded outputs."""

    name = "block-reconstruction"
    requires = ("weight-ranges",)
    after = (
        "temporal-reconstruction",
        "bit-allocation",
        "weight-group-sizes",
        "timestep-reduction",
        "gptq",
        "activation-ranges",
        "exempt-layers",
    )

    class Options(PassOptions):
        """Options of ``block-reconstruction``.

        Attributes:
            method: ``"sign"``: sign steps through the rounding itself, better by measurement
                (`benchmarks/rounding.py`); ``"adaround"``: the relaxation of the papers.
            iterations: optimiser steps for each block (the papers': 20,000).
            learning_rate: of the first step (the papers': 1e-3).
            weight: factor of AdaRound's regulariser (the papers': 0.01, of plain sums).
            relative: AdaRound's loss counts in units of that before learning, its regulariser per variable. By
                measurement one factor then suits all blocks; off: the papers' plain sums.
            calls: recorded calls to learn from, drawn evenly over the recording.
            samples: of these calls together; None: all.
            most_bits: wider weights keep their rounding, and so do the ranges of blocks that have only such weights.
            freeze_temporal: leave the layers that depend on t alone, and those that ``temporal-reconstruction`` has
                decided, as they are; off: reconstruct them with their block, as methods before TFMQ-DM do.
            quantize_inputs: learn against quantized activations; None: where the plan has some of fewer than 8 bits.
            learn_ranges: learn the ranges of quantized inputs with the rounding; None: where activations are quantized
                while it is learned.
            range_rate: learning rate of ranges, see `dq_plugins.quantized.variables`.
        """

        method: MethodName = "sign"
        iterations: int = Field(400, ge=1)
        learning_rate: float = Field(1e-2, gt=0)
        weight: float = Field(1e5, ge=0)
        relative: bool = True
        calls: int = Field(40, ge=1)
        samples: int | None = Field(None, ge=1)
        most_bits: int = Field(16, ge=1, le=16)
        freeze_temporal: bool = True
        quantize_inputs: bool | None = None
        learn_ranges: bool | None = None
        range_rate: float = Field(5e-3, gt=0)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    @property
    def method(self) -> RoundingMethod:
        """How rounding is learned, as the options say."""
        o = self.options
        return rounding_method(o.method, o.iterations, o.learning_rate, o.weight, relative=o.relative)

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Write learned codes block by block; after an interruption, learning goes on in the block it was in."""
        frozen = self._frozen(plan, context)
        learnable = [n for n, layer in plan.layers.items() if n not in frozen and self._learns(layer)]
        units = find_units(context.partition, learnable)
        run, inputs = planned_run(context.denoiser, plan), sees_quantized_inputs(plan, self.options.quantize_inputs)
        states = planned_states(run, plan, quantize_inputs=inputs)
        found = {}
        started, finished = time.perf_counter(), context.finished(BLOCK, plan, self.options)
        learning = context.finished(STATE, plan, self.options)
        calls = context.calibration.spread(self.options.calls, self.options.samples)
        with block_recorder(units, context.partition, calls, context.workdir) as recorder:
            for done, unit in enumerate(units):
                block = finished.find(unit.module)
                if block is None:
                    block = yield from self._unit(unit, done, recorder, run, states, plan, context, learning)
                    block = finished.keep(unit.module, block)
                learning.forget(unit.module)
                block.write(plan, context.denoiser)
                states |= planned_states(run, plan, unit.layers, quantize_inputs=inputs)
                found[unit.module] = block.losses
                yield Progress(done + 1, len(units), unit.module)
        context.measurements[self.name] = {
            "seconds": time.perf_counter() - started,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        plan.sections[self.name] = Section({"blocks": found, "frozen": sorted(frozen & set(plan.layers))})

    def _learns(self, layer: LayerPlan) -> bool:
        quant = layer.weight
        if quant is None or LAYER_KINDS[layer.kind].lookup:
            return False
        return quant.rounds and quant.bits <= self.options.most_bits

    def _frozen(self, plan: QuantPlan, context: PassContext) -> frozenset[str]:
        """The temporal block, and layers whose rounding is settled beyond it."""
        if not self.options.freeze_temporal:
            return frozenset()
        return context.partition.temporal | plan.learned_layers

    def _unit(
        self,
        unit: Unit,
        done: int,
        recorder: BlockRecorder,
        run: QuantizedRun,
        states: States,
        plan: QuantPlan,
        context: PassContext,
        kept: UnitResults[LearnerState],
    ) -> Generator[Progress, None, LearnedUnit]:
        def progress(iteration: int) -> Progress | None:
            what = f"{unit.module} {iteration}/{self.options.iterations}"
            return None if iteration % SHOWN_EVERY else Progress(done, len(recorder.units), what)

        planned = self._variables(unit, run, plan, sees_quantized_inputs(plan, self.options.quantize_inputs))
        with run:
            cache = recorder.record(run, unit, lambda: states)
            return LearnedUnit.of((yield from reported(self.learn(cache, planned, states, context, kept), progress)))

    def _variables(self, unit: Unit, run: QuantizedRun, plan: QuantPlan, quantize_inputs: bool) -> PlannedVariables:
        o = self.options
        learn: list[What] = ["rounding"]
        if quantize_inputs and o.learn_ranges is not False:
            learn.append("ranges")
        return PlannedVariables(run, plan, unit.layers, learn, self.method, rate=o.range_rate / o.learning_rate)

    def learn(
        self,
        cache: BlockCache,
        planned: PlannedVariables,
        states: States,
        context: PassContext,
        kept: UnitResults[LearnerState] = NOTHING_KEPT,
    ) -> Generator[int, None, Learned[Key]]:
        """Learn the variables of one block's layers; yields the number of finished iterations."""
        return learn_block(planned, cache, states, self.method, context.generator(cache.unit.module), kept)
