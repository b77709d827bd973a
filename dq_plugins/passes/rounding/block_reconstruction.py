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
import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from dq_plugins.artifact import STRICT, Format, StoredTensor
from dq_plugins.plan import QuantPlan, Section, WeightQuant
from dq_plugins.progress import Progress, reported
from dq_plugins.quantized.balance import balanced_weight, unbalanced
from dq_plugins.quantized.block_cache import BlockCache, BlockRecorder, block_loss
from dq_plugins.quantized.learner import Learned, Learner
from dq_plugins.quantized.reconstruction_units import Unit, find_units
from dq_plugins.quantized.rounding_methods import MethodName, rounding_method
from dq_plugins.quantized.rounding_variables import RoundingMethod
from dq_plugins.quantized.run import QuantizedRun, States, planned_run, planned_states, sees_quantized_inputs
from dq_plugins.recipe import Pass, PassContext, PassOptions

SHOWN_EVERY = 20  # iterations


@dataclass(frozen=True)
class FinishedBlock:
    """What was learned of a block: its losses, and codes of those layers that keep them."""

    __pydantic_config__ = STRICT

    losses: dict[str, float | bool]
    codes: dict[str, StoredTensor]


BLOCK: Format[FinishedBlock] = Format("reconstructed-block", 1, FinishedBlock, what="a reconstructed block")


class BlockReconstruction(Pass):
    """Learned rounding of everything but the temporal block."""

    name = "block-reconstruction"
    requires = ("weight-ranges",)
    after = ("temporal-reconstruction", "bit-allocation", "timestep-reduction", "gptq", "activation-ranges")

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
            freeze_temporal: leave the layers that depend on t alone, and those that ``temporal-reconstruction`` has
                decided, as they are; off: reconstruct them with their block, as methods before TFMQ-DM do.
            quantize_inputs: learn against quantized activations; None: where the plan has some of fewer than 8 bits.
        """

        method: MethodName = "sign"
        iterations: int = Field(400, ge=1)
        learning_rate: float = Field(1e-2, gt=0)
        weight: float = Field(1e5, ge=0)
        relative: bool = True
        calls: int = Field(40, ge=1)
        freeze_temporal: bool = True
        quantize_inputs: bool | None = None

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    @property
    def method(self) -> RoundingMethod:
        """How rounding is learned, as the options say."""
        o = self.options
        return rounding_method(o.method, o.iterations, o.learning_rate, o.weight, relative=o.relative)

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Write learned codes block by block; a finished block is not learned again after an interruption."""
        frozen = self._frozen(plan, context)
        rounded = [n for n, layer in plan.layers.items() if layer.weight and layer.weight.rounds and n not in frozen]
        learnable = [n for n in rounded if not context.partition.layers[n].lookup]
        units = find_units(context.partition, learnable)
        run, inputs = planned_run(context.denoiser, plan), sees_quantized_inputs(plan, self.options.quantize_inputs)
        states = planned_states(run, plan, quantize_inputs=inputs)
        found = {}
        started, finished = time.perf_counter(), context.finished(BLOCK, plan, self.options)
        with _recorder(units, context, self.options.calls) as recorder:
            for done, unit in enumerate(units):
                block = finished.find(unit.module)
                if block is None:
                    block = yield from self._unit(unit, done, recorder, run, states, plan, context)
                    finished.keep(unit.module, block)
                for name, learned in block.codes.items():
                    _quant(plan, name).codes = learned.cpu()
                states |= planned_states(run, plan, block.codes, quantize_inputs=inputs)
                found[unit.module] = block.losses
                yield Progress(done + 1, len(units), unit.module)
        context.measurements[self.name] = {
            "seconds": time.perf_counter() - started,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        plan.sections[self.name] = Section({"blocks": found, "frozen": sorted(frozen & set(plan.layers))})

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
    ) -> Generator[Progress, None, FinishedBlock]:
        def progress(iteration: int) -> Progress | None:
            what = f"{unit.module} {iteration}/{self.options.iterations}"
            return None if iteration % SHOWN_EVERY else Progress(done, len(recorder.units), what)

        with run:
            cache = recorder.record(run, unit, lambda: states)
            result = yield from reported(self.learn(unit, cache, run, states, plan, context), progress)
        verdict = result.verdict
        losses = {"start": verdict.start_loss, "learned": verdict.learned_loss, "kept_start": verdict.kept_start}
        return FinishedBlock(losses, result.codes)

    def learn(
        self, unit: Unit, cache: BlockCache, run: QuantizedRun, states: States, plan: QuantPlan, context: PassContext
    ) -> Generator[int, None, Learned[str]]:
        """Learn the rounding of one block's layers; yields the number of finished iterations."""
        method, modules = self.method, run.modules
        balance = {n: plan.layers[n].balance for n in unit.layers}
        variables = {n: method.variables(balanced_weight(modules[n], b), _quant(plan, n)) for n, b in balance.items()}
        draw = context.generator(unit.module)
        order = torch.randint(len(cache), (self.options.iterations,), generator=draw).tolist()

        def error(weights: dict[str, Tensor], call: int) -> Tensor:
            learning = {n: states[n]._replace(weight=unbalanced(modules[n], w, balance[n])) for n, w in weights.items()}
            return block_loss(run, cache, call, {**states, **learning})

        return Learner(
            variables, lambda weights, i: error(weights, order[i]), method, judge=error, probes=len(cache)
        ).run()


@contextmanager
def _recorder(units: list[Unit], context: PassContext, calls: int) -> Iterator[BlockRecorder]:
    """A recorder whose files are gone afterwards, with those that an interrupted run has left."""
    if context.workdir is not None:
        for left in context.workdir.glob("dq-blocks-*"):
            shutil.rmtree(left)
    everything = find_units(context.partition, context.partition.layers)
    with TemporaryDirectory(prefix="dq-blocks-", dir=context.workdir) as folder:
        yield BlockRecorder(units, context.calibration.spread(calls), Path(folder), everything)


def _quant(plan: QuantPlan, name: str) -> WeightQuant:
    quant = plan.layers[name].weight
    assert quant is not None
    return quant
