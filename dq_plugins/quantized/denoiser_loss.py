"""Error of a quantized denoiser's output in recorded calls: some images to learn from, others to judge by.

Every iteration runs a few images of one call, in random order, all images once in each pass. The loss of a call is its
mean squared error over the mean square of the recorded outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dq_plugins.calibration import CalibrationSet
from dq_plugins.calibration.call import Call
from dq_plugins.quantized.run import QuantizedRun, States

HELD_OUT = 4  # one image in so many is judged on


class DenoiserLoss:
    """Losses of what a denoiser's layers compute with.

    Args:
        run: of the denoiser; open when a loss is asked for.
        calibration: recorded calls.
        images: of a call, for each iteration.
        generator: of the order.
    """

    def __init__(self, run: QuantizedRun, calibration: CalibrationSet, images: int, generator: torch.Generator) -> None:
        self.run, self.calibration, self.generator = run, calibration, generator
        self._learned: list[tuple[float, Part]] = []
        self._judged: list[tuple[float, Part]] = []
        power = count = 0.0
        for t in calibration.timesteps:
            learned, judged = divided(calibration, t)
            for position, rows in learned:
                power, count = power + float(calibration.call(t, position).output.square().mean()), count + 1
                self._learned += [(t, Part(position, rows[i : i + images])) for i in range(0, len(rows), images)]
            self._judged += [(t, part) for part in judged]
        self.power = max(power / count, 1e-30)
        self._order: list[int] = []

    @property
    def per_pass(self) -> int:
        """Iterations that see every image that is learned from once."""
        return len(self._learned)

    @property
    def probes(self) -> int:
        """Numbers that `judge` takes, one a call."""
        return len(self._judged)

    def learn(self, states: States, iteration: int) -> Tensor:
        """Loss of an iteration; differentiable in whatever of the states requires gradients."""
        while len(self._order) <= iteration:
            self._order += torch.randperm(self.per_pass, generator=self.generator).tolist()
        return self._loss(states, self._learned[self._order[iteration]])

    def judge(self, states: States, probe: int) -> Tensor:
        """Loss of images that are never learned from."""
        return self._loss(states, self._judged[probe])

    def _loss(self, states: States, what: tuple[float, Part]) -> Tensor:
        call = what[1].call(self.calibration, what[0])
        self.run.use(states)
        return (call.run(self.run.denoiser) - call.output).square().mean() / self.power


class Part(NamedTuple):
    """Some samples of one of the calls at a timestep."""

    position: int
    rows: list[int]

    def call(self, calibration: CalibrationSet, timestep: float) -> Call:
        """The call with these samples alone."""
        call = calibration.call(timestep, self.position)
        return call.rows(torch.tensor(self.rows), len(call.output))


def divided(calibration: CalibrationSet, timestep: float) -> tuple[list[Part], list[Part]]:
    """The calls at a timestep: what is learned from, and what is held out to judge by.

    Held out are the last samples of every batch, so that where all batches of a run hold the same images in the same
    order, nothing of these is seen at any timestep. Of calls with one sample some are held out whole; a single sample
    serves both.
    """
    count = calibration.count(timestep)
    sizes = [len(calibration.call(timestep, position).output) for position in range(count)]
    if max(sizes) == 1:
        judged = list(range(HELD_OUT - 1, count, HELD_OUT)) or [count - 1]
        learned = [place for place in range(count) if place not in judged] or judged
        return [Part(place, [0]) for place in learned], [Part(place, [0]) for place in judged]
    first = [max(size - max(size // HELD_OUT, 1), 1) for size in sizes]  # held-out row
    learned = [Part(place, list(range(end))) for place, end in enumerate(first)]
    judged = [Part(place, list(range(end, size))) for place, (end, size) in enumerate(zip(first, sizes, strict=True))]
    return learned, [part for part in judged if part.rows]
