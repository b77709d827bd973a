"""Learn the quantizers of all widths together: rounding of weights and step sizes of inputs, block by block.

    L = mean over positions of  sum over channels (y - y^)^2  +  rounding regulariser of the widths in use

In every iteration each quantizer of the block gets a width drawn at random, and only the parameters of the drawn widths
move: they learn to work beside any neighbour (TMPQ-DM's published idea; its released code lacks these functions).
``independent`` gives the whole block one width at a time, as the released code does; ``fixed`` one assignment, as a
network calibrated for it alone would get. The inputs of a block are those that the quantized layers before it give, at
widths drawn in the same way.

Shapes: ``G`` timestep groups.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dq_plugins.affine import integer_range
from dq_plugins.calibration import CalibrationSet, first_tensor
from dq_plugins.errors import RecipeError
from dq_plugins.graph import Partition
from dq_plugins.plan import ActivationQuant, WeightQuant
from dq_plugins.progress import Progress
from dq_plugins.quantized.block_cache import BlockCache, record_block
from dq_plugins.quantized.candidates import Candidates
from dq_plugins.quantized.learner import RoundingOptions
from dq_plugins.quantized.network import SuperNetwork
from dq_plugins.quantized.soft_rounding import SoftRounding
from dq_plugins.quantized.units import Unit, find_units
from dq_plugins.quantized.width import Width

Draw = Literal["random", "independent", "fixed"]
Widths = dict[str, Width]
PROBES = 8
"""Recorded calls on which learned rounding is compared with rounding to nearest."""


@dataclass(frozen=True)
class CalibrationOptions:
    """Settings.

    Attributes:
        draw: how widths are drawn.
        iterations: optimiser steps for each block; for each block and width with ``independent``.
        learning_rate: of the rounding variables (Adam).
        step_rate: of the logarithms of the step sizes; the paper's code has 4e-4 on the step sizes themselves.
        weight: factor of the rounding regulariser.
        calls: recorded calls to learn from, drawn evenly over the recording.
        seed: of every random choice.
        fixed: the assignment of ``fixed``.
    """

    draw: Draw = "random"
    iterations: int = 400
    learning_rate: float = 1e-2
    step_rate: float = 1e-3
    weight: float = 0.01
    calls: int = 40
    seed: int = 0
    fixed: Mapping[str, Width] = field(default_factory=dict)


def calibrate(
    denoiser: nn.Module,
    candidates: Candidates,
    calibration: CalibrationSet,
    partition: Partition,
    options: CalibrationOptions,
) -> Generator[Progress, None, Candidates]:
    """Learn; iterate to run, the generator returns the learned candidates.

    Args:
        denoiser: full precision; left as it is.
        candidates: where learning starts.
        calibration: recorded calls.
        partition: the denoiser's layers and blocks.
        options: settings.

    Raises:
        RecipeError: a loss is not finite.
    """
    generator = torch.Generator().manual_seed(options.seed)
    learnable = [n for n in candidates.layers if not partition.layers[n].lookup]
    units = find_units(partition, learnable)
    student = copy.deepcopy(denoiser)
    rounds = _rounds(candidates, options)
    total = len(units) * len(rounds)
    chosen = _spread(calibration, options.calls)
    for index, unit in enumerate(units):
        for place, draw in enumerate(rounds):
            with TemporaryDirectory(prefix="dq-supernet-") as folder:
                cache = _record(denoiser, student, unit, candidates, calibration, chosen, draw, generator, folder)
                learner = _Learner(denoiser, unit, candidates, cache, _timesteps(calibration, chosen), options)
                yield Progress(index * len(rounds) + place, total, unit.module)
                candidates = learner.learn(draw, generator)
    yield Progress(total, total, "super-network")
    return candidates


class _Round:
    """How widths are drawn during a round of learning."""

    def __init__(
        self, candidates: Candidates, fixed: Mapping[str, Width] | None = None, place: int | None = None
    ) -> None:
        self.candidates, self.fixed, self.place = candidates, fixed, place

    def __call__(self, generator: torch.Generator) -> Widths:
        if self.fixed is not None:
            return dict(self.fixed)
        return {
            name: Width(*(self._one(name, side, generator) for side in ("w", "a"))) for name in self.candidates.layers
        }

    def _one(self, name: str, side: str, generator: torch.Generator) -> int | None:
        menu = sorted((self.candidates.weights if side == "w" else self.candidates.activations).get(name, {}))
        if not menu:
            return None
        place = int(torch.randint(len(menu), (), generator=generator)) if self.place is None else self.place
        return menu[min(place, len(menu) - 1)]


def _rounds(candidates: Candidates, options: CalibrationOptions) -> list[_Round]:
    if options.draw == "fixed":
        return [_Round(candidates, options.fixed)]
    if options.draw == "random":
        return [_Round(candidates)]
    tables = [*candidates.weights.values(), *candidates.activations.values()]
    return [_Round(candidates, place=place) for place in range(max(len(t) for t in tables))]


def _spread(calibration: CalibrationSet, wanted: int) -> list[int]:
    """Indices of calls spread evenly over the recording."""
    count = len(calibration)
    wanted = min(wanted, count)
    return sorted({round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)})


def _timesteps(calibration: CalibrationSet, chosen: list[int]) -> list[Tensor]:
    return [call.timestep for call in calibration.subset(calls=chosen).calls()]


def _record(
    denoiser: nn.Module,
    student: nn.Module,
    unit: Unit,
    candidates: Candidates,
    calibration: CalibrationSet,
    chosen: list[int],
    draw: _Round,
    generator: torch.Generator,
    folder: str,
) -> BlockCache:
    """Inputs of a block behind layers of drawn widths, and its full-precision outputs."""
    with SuperNetwork(student, candidates, calibration.timestep_argument) as network:
        hook = student.register_forward_pre_hook(lambda *_: network.switch(draw(generator)))
        try:
            return record_block(denoiser, student, unit.module, calibration, chosen, Path(folder))
        finally:
            hook.remove()


class _Learner:
    """The variables of one block, at all widths."""

    def __init__(
        self,
        denoiser: nn.Module,
        unit: Unit,
        candidates: Candidates,
        cache: BlockCache,
        timesteps: list[Tensor],
        options: CalibrationOptions,
    ) -> None:
        self.unit, self.candidates, self.cache, self.options = unit, candidates, cache, options
        self.block, self.timesteps = denoiser.get_submodule(unit.module), timesteps
        self.layers = {name: denoiser.get_submodule(name) for name in unit.layers}
        self.rounding = {
            (name, bits): SoftRounding(self._weight(name), quant)
            for name in unit.layers
            for bits, quant in candidates.weights.get(name, {}).items()
            if quant.rounds
        }
        self.signs = {
            (name, bits): quant.fake_quantize(self._weight(name))
            for name in unit.layers
            for bits, quant in candidates.weights.get(name, {}).items()
            if not quant.rounds
        }
        self.steps = {
            (name, bits): torch.zeros(len(quant.scale), requires_grad=True)
            for name in unit.layers
            for bits, quant in candidates.activations.get(name, {}).items()
        }

    def _weight(self, name: str) -> Tensor:
        weight: Any = self.layers[name].weight
        return weight.detach()

    def learn(self, draw: _Round, generator: torch.Generator) -> Candidates:
        """Optimise, decide every rounding, and return candidates with what was learned."""
        o, schedule = self.options, RoundingOptions(self.options.iterations)
        used: set[tuple[str, int]] = set()
        with torch.enable_grad():
            optimiser = torch.optim.Adam(
                [
                    {"params": [v.alpha for v in self.rounding.values()], "lr": o.learning_rate},
                    {"params": list(self.steps.values()), "lr": o.step_rate},
                ]
            )
            for iteration in range(o.iterations):
                widths = draw(generator)
                index = int(torch.randint(len(self.cache), (), generator=generator))
                drawn = {(n, widths[n].weight) for n in self.unit.layers if widths[n].weight is not None}
                rounded: list[Any] = [key for key in drawn if key in self.rounding]
                used |= set(rounded)
                weights = {n: self.signs[n, b] for n, b in drawn if (n, b) in self.signs}  # type: ignore[index]
                weights |= {n: self.rounding[n, b].soft() for n, b in rounded}
                loss = self._loss(weights, widths, index)
                if not bool(torch.isfinite(loss)):
                    raise RecipeError(
                        f"the loss of block {self.unit.module!r} is {loss.item()} at iteration {iteration}"
                    )
                beta = schedule.beta(iteration)
                if beta is not None and rounded:
                    undecided = [self.rounding[key].undecided(beta) for key in rounded]
                    loss = loss + o.weight * torch.stack(undecided).sum()
                optimiser.zero_grad()  # to None: what was not drawn does not move
                if loss.requires_grad:  # signs alone leave nothing to learn
                    loss.backward()
                    optimiser.step()
        return self._learned(used)

    def _loss(self, weights: Mapping[str, Tensor], widths: Mapping[str, Width], index: int) -> Tensor:
        args, kwargs, target = self.cache.get(index)
        replaced = {f"{n}.weight"[len(self.unit.module) + 1 :]: w for n, w in weights.items()}
        with self._quantized_inputs(widths, self.timesteps[index]):
            output = first_tensor(torch.func.functional_call(self.block, replaced, args, kwargs))
        return (output - target).square().sum(self.unit.channel_axis).mean()

    @contextmanager
    def _quantized_inputs(self, widths: Mapping[str, Width], timestep: Tensor) -> Iterator[None]:
        handles = []
        try:
            for name, layer in self.layers.items():
                bits = widths[name].activation
                if bits is not None:
                    handles.append(layer.register_forward_pre_hook(self._hook(name, bits, timestep)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, bits: int, timestep: Tensor) -> Any:
        quant = self.candidates.activations[name][bits]
        index = self.candidates.groups[quant.groups].index(timestep.reshape(-1))
        # a call has one timestep, or so many that the first one's group stands for the batch
        scale = (quant.scale * self.steps[name, bits].exp())[index[0]]
        zero_point, (low, high) = quant.zero_point[index[0]], integer_range(bits)

        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            ratio = args[0] / scale
            rounded = ratio + (ratio.round() - ratio).detach()  # straight through
            return (((rounded + zero_point).clamp(low, high) - zero_point) * scale, *args[1:])

        return hook

    @torch.no_grad()
    def _learned(self, used: set[tuple[str, int]]) -> Candidates:
        weights = {name: dict(table) for name, table in self.candidates.weights.items()}
        inputs = {name: dict(table) for name, table in self.candidates.activations.items()}
        for (name, bits), step in self.steps.items():
            quant: ActivationQuant = inputs[name][bits]
            inputs[name][bits] = replace(quant, scale=quant.scale * step.detach().exp())
        for bits in sorted({b for _, b in used}):
            layers = [n for n in self.unit.layers if (n, bits) in used]
            if self._better(layers, bits):
                for name in layers:
                    quant_of: WeightQuant = weights[name][bits]
                    weights[name][bits] = replace(quant_of, codes=self.rounding[name, bits].codes())
        return Candidates(weights, inputs, self.candidates.groups)

    def _better(self, layers: list[str], bits: int) -> bool:
        """Whether learned rounding of some layers at a width beats rounding to nearest, with full-precision inputs."""
        plain = dict.fromkeys(self.layers, Width())
        learned = {n: self.rounding[n, bits].hard() for n in layers}
        nearest = {n: self.rounding[n, bits].nearest() for n in layers}
        probes = range(min(PROBES, len(self.cache)))
        losses = [sum(float(self._loss(w, plain, i)) for i in probes) for w in (learned, nearest)]
        return losses[0] < losses[1]
