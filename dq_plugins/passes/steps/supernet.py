"""Learn the quantizers of all widths together: rounding of weights and step sizes of inputs, block by block.

    L = mean over positions of  sum over channels (y - y^)^2

In every iteration each quantizer of the block gets a width drawn at random, and only the parameters of the drawn widths
move: they learn to work beside any neighbour (TMPQ-DM's published idea; its released code lacks these functions).
``independent`` gives the whole block one width at a time, as the released code does; a given assignment is learned as a
network calibrated for it alone would be. The inputs of a block are those that the quantized layers before it give: each
recorded call has an assignment of its own, drawn in the same way.

Every block draws from random numbers of its own, and those of the calls are the same whichever block comes next. So
learning goes on behind the last finished block, or inside of the block it was in, as if it had never stopped.

Shapes: ``G`` timestep groups.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dq_plugins.artifact import STRICT, Format, StoredTensor, UnitResults
from dq_plugins.calibration import CalibrationSet
from dq_plugins.graph import Partition
from dq_plugins.hashing import hash_json
from dq_plugins.plan import ActivationQuant
from dq_plugins.progress import Progress, reported
from dq_plugins.quantized.block_cache import BlockCache, BlockRecorder, block_loss
from dq_plugins.quantized.candidates import Candidates
from dq_plugins.quantized.layer import LayerState
from dq_plugins.quantized.layer_transform import restored_weight, transformed_weight
from dq_plugins.quantized.learner import Learner, LearnerState
from dq_plugins.quantized.network import SuperNetwork
from dq_plugins.quantized.reconstruction_units import Unit, find_units
from dq_plugins.quantized.resuming import NOTHING_KEPT, resumable
from dq_plugins.quantized.rounding_methods import MethodName, rounding_method
from dq_plugins.quantized.width import Width
from dq_plugins.scratch import Scratch

Widths = dict[str, Width]
Draw = Callable[[torch.Generator], Widths]
Key = tuple[str, int]  # layer and bits
SHOWN_EVERY = 20  # iterations
PROBES = 8
"""Recorded calls on which learned rounding is compared with rounding to nearest."""


@dataclass(frozen=True)
class CalibrationOptions:
    """Settings.

    Attributes:
        draw: how widths are drawn, or the one assignment to learn.
        method: how rounding is learned, see `rounding_method`.
        iterations: optimiser steps for each block; for each block and width with ``independent``.
        learning_rate: of the rounding variables.
        step_rate: of the logarithms of the step sizes; the paper's code has 4e-4 on the step sizes themselves.
        weight: factor of AdaRound's regulariser, of the widths in use.
        calls: recorded calls to learn from, drawn evenly over the recording.
        seed: of every random choice.
    """

    draw: Literal["random", "independent"] | Mapping[str, Width] = "random"
    method: MethodName = "sign"
    iterations: int = 400
    learning_rate: float = 1e-2
    step_rate: float = 1e-3
    weight: float = 0.01
    calls: int = 40
    seed: int = 0


@dataclass(frozen=True)
class LearnedWidths:
    """What was learned of one block.

    Attributes:
        steps: factors of input scales ``[G]``, by layer and width.
        codes: of weights, by layer and width; what stays rounded to nearest is left out.
    """

    __pydantic_config__ = STRICT

    steps: dict[str, dict[int, StoredTensor]]
    codes: dict[str, dict[int, StoredTensor]]

    def write(self, candidates: Candidates) -> Candidates:
        """The candidates with what was learned."""
        weights = {name: dict(table) for name, table in candidates.weights.items()}
        inputs = {name: dict(table) for name, table in candidates.activations.items()}
        for name, steps in self.steps.items():
            for bits, step in steps.items():
                quant: Any = inputs[name][bits]
                inputs[name][bits] = replace(quant, scale=quant.scale * step)
        for name, codes in self.codes.items():
            for bits, own in codes.items():
                weights[name][bits] = replace(weights[name][bits], codes=own)
        return replace(candidates, weights=weights, activations=inputs)


LEARNED: Format[LearnedWidths] = Format(
    "learned-widths", 1, LearnedWidths, what="what was learned of a block's quantizers of all widths"
)
NOTHING_LEARNED = UnitResults(LEARNED, None, {})


def calibrate(
    denoiser: nn.Module,
    candidates: Candidates,
    calibration: CalibrationSet,
    partition: Partition,
    options: CalibrationOptions,
    kept: UnitResults[LearnedWidths] = NOTHING_LEARNED,
    learning: UnitResults[LearnerState] = NOTHING_KEPT,
) -> Generator[Progress, None, Candidates]:
    """Learn, beginning with ``candidates``; iterate to run, the generator returns the learned ones.

    Args:
        denoiser: the full-precision one.
        candidates: quantizers to begin with.
        calibration: recorded calls.
        partition: of the denoiser.
        options: settings.
        kept: where finished blocks are; they are not learned again.
        learning: where the state of the block that is being learned is, see `resumable`.

    Raises:
        RecipeError: a loss is not finite.
    """
    learnable = [n for n in candidates.layers if not partition.layers[n].lookup]
    units = find_units(partition, learnable)
    draws = _draws(candidates, options)
    calls = calibration.spread(options.calls)
    rounds = [(unit, stream) for unit in units for stream in range(len(draws))]
    with Scratch("supernet", kept.folder) as folder:
        recorder = BlockRecorder(units, calls, folder)
        for done, (unit, stream) in enumerate(rounds):
            yield Progress(done, len(rounds), unit.module)
            name = f"{unit.module} {stream}"
            learned = kept.find(name)
            if learned is None:
                draw, network = draws[stream], SuperNetwork(denoiser, candidates, calibration.timestep_argument)
                of_calls = _generator(options.seed, "calls", stream)
                with network:
                    states = lambda n=network, d=draw, g=of_calls: n.states(d(g))  # noqa: E731
                    cache = recorder.record(network, unit, states, str(stream))
                    generator = _generator(options.seed, unit.module, stream)
                    block = _BlockLearner(network, unit, cache, draw, generator, options)
                    learned = yield from _learned(block, learning, name, Progress(done, len(rounds), unit.module))
                kept.keep(name, learned)
            learning.forget(name)
            candidates = learned.write(candidates)
    yield Progress(len(rounds), len(rounds), "super-network")
    return candidates


def _learned(
    block: _BlockLearner, learning: UnitResults[LearnerState], name: str, progress: Progress
) -> Generator[Progress, None, LearnedWidths]:
    def shown(iteration: int) -> Progress | None:
        what = f"{progress.what} {iteration}/{block.options.iterations}"
        return None if iteration % SHOWN_EVERY else progress._replace(what=what)

    return block.found((yield from reported(resumable(block.learner, learning, name), shown)).decided)


def _generator(seed: int, *names: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(int(hash_json([seed, *names])[:16], 16) % 2**63)


def _draws(candidates: Candidates, options: CalibrationOptions) -> list[Draw]:
    """How each round of learning draws its widths."""
    if isinstance(options.draw, Mapping):
        fixed = dict(options.draw)
        return [lambda _: fixed]
    if options.draw == "random":
        return [partial(_drawn, candidates, None)]
    tables = [*candidates.weights.values(), *candidates.activations.values()]
    return [partial(_drawn, candidates, place) for place in range(max(len(t) for t in tables))]


def _drawn(candidates: Candidates, place: int | None, generator: torch.Generator) -> Widths:
    """Widths at one place among the choices, counted from the narrowest; None: at random ones."""

    def one(table: Mapping[int, object]) -> int | None:
        choices = sorted(table)
        if not choices:
            return None
        drawn = int(torch.randint(len(choices), (), generator=generator)) if place is None else place
        return choices[min(drawn, len(choices) - 1)]

    tables = candidates.weights, candidates.activations
    return {name: Width(*(one(table.get(name, {})) for table in tables)) for name in candidates.layers}


class _BlockLearner:
    """The variables of one block, at all widths."""

    def __init__(
        self,
        network: SuperNetwork,
        unit: Unit,
        cache: BlockCache,
        draw: Draw,
        generator: torch.Generator,
        options: CalibrationOptions,
    ) -> None:
        self.network, self.unit, self.cache, self.draw, self.generator = network, unit, cache, draw, generator
        self.options, self.candidates = options, network.candidates
        self.drawn: list[tuple[Widths, int]] = []
        self.method = rounding_method(options.method, options.iterations, options.learning_rate, options.weight)
        self.rounding = {
            (name, bits): self.method.variables(self._transformed(name), quant)
            for name in unit.layers
            for bits, quant in self.candidates.weights.get(name, {}).items()
            if quant.rounds
        }
        self.steps = {
            (name, bits): torch.zeros(len(quant.scale), requires_grad=True)
            for name in unit.layers
            for bits, quant in self.candidates.activations.get(name, {}).items()
            if isinstance(quant, ActivationQuant)
        }
        self.learner = Learner(
            self.rounding,
            self._loss,
            self.method,
            others=[{"params": list(self.steps.values()), "lr": options.step_rate}],
            drawn=self._drawn,
            together=lambda key: key[1],
            judge=self._judge,
            probes=min(PROBES, len(cache)),
        )

    def found(self, decided: Mapping[Key, Tensor]) -> LearnedWidths:
        """What was learned, with the rounding that was decided."""
        found = LearnedWidths({}, {})
        for (name, bits), step in self.steps.items():
            found.steps.setdefault(name, {})[bits] = step.detach().exp()
        for (name, bits), codes in decided.items():
            found.codes.setdefault(name, {})[bits] = codes.cpu()
        return found

    def _of(self, iteration: int) -> tuple[Widths, int]:
        """Widths and recorded call of an iteration; random, and the same wherever learning began."""
        while len(self.drawn) <= iteration:
            widths = self.draw(self.generator)
            index = int(torch.randint(len(self.cache), (), generator=self.generator))
            self.drawn.append(({name: widths[name] for name in self.unit.layers}, index))
        return self.drawn[iteration]

    def _drawn(self, iteration: int) -> list[Key]:
        """The rounding variables that an iteration moves."""
        widths, _ = self._of(iteration)
        return [(n, w.weight) for n, w in widths.items() if (n, w.weight) in self.rounding]  # type: ignore[misc]

    def _loss(self, weights: Mapping[Key, Tensor], iteration: int) -> Tensor:
        """Error of the block at the drawn widths, in a recorded call drawn at random."""
        widths, index = self._of(iteration)
        states = self.network.states(widths)
        for (name, bits), step in self.steps.items():
            if widths[name].activation == bits:
                scale = self.candidates.activations[name][bits].scale
                self.network.input(name, bits).scale = scale.to(step.device) * step.exp()
        learning = {name: states[name]._replace(weight=self._restored(name, w)) for (name, _), w in weights.items()}
        return block_loss(self.network, self.cache, index, {**states, **learning})

    def _judge(self, weights: Mapping[Key, Tensor], probe: int) -> Tensor:
        """Error of the block with weights of one width, and everything else in full precision."""
        states = {
            name: LayerState(self._restored(name, weight), branch=self.network.branch(name, None)[0])
            for (name, _), weight in weights.items()
        }
        return block_loss(self.network, self.cache, probe, states)

    def _transformed(self, name: str) -> Tensor:
        transform = self.candidates.transforms.get(name)
        return transformed_weight(self.network.modules[name], transform, self.network.full_weight(name))

    def _restored(self, name: str, weight: Tensor) -> Tensor:
        return restored_weight(self.network.modules[name], weight, self.candidates.transforms.get(name))
