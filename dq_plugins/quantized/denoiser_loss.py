"""Error of a quantized denoiser's output in recorded calls: some images to learn from, others to judge by.

Every iteration runs a few images of one call, in random order, all images once in each pass. With ``e`` the mean
squared error of an image in a call, in which timestep t has the weight ``w``,

    L = w_t mean log e                              of an iteration: mean over its images
    J = sum_t w_t e_t / e_t0  /  sum_t w_t          of an image that judges: e_t0 before learning

so an image counts by the share of its own error that is taken away. Plain means would be those of the few images whose
errors are far above the others' (recordings have such): learning from one of them and judged by another, all others got
worse. Timesteps count by their errors as in a plain mean, ``w_t`` is the geometric mean of e_t0 over images that judge.

Shapes: ``B`` images of a call; it has ``b B`` rows, ``b = 2`` where it is guided.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dq_plugins.calibration import CalibrationSet
from dq_plugins.calibration.call import Call
from dq_plugins.quantized.run import QuantizedRun, States

HELD_OUT = 4  # one image in so many is judged on
LEAST = 1e-30  # error of an image, so that a perfect one has a logarithm


class Part(NamedTuple):
    """Some images of one of the calls at a timestep, each with all its rows."""

    position: int
    images: list[int]
    branches: int = 1

    def call(self, calibration: CalibrationSet, timestep: float) -> Call:
        """The call with these images alone."""
        call = calibration.call(timestep, self.position)
        count = len(call.output) // self.branches
        rows = [branch * count + image for branch in range(self.branches) for image in self.images]
        return call.rows(torch.tensor(rows), len(call.output))


class DenoiserLoss:
    """Losses of what a denoiser's layers compute with.

    Args:
        run: of the denoiser; open here, and when a loss is asked for.
        calibration: recorded calls.
        argument: name of the denoiser's sample argument.
        start: what layers compute with before learning.
        images: of a call, for each iteration.
        generator: of the order.
    """

    def __init__(
        self,
        run: QuantizedRun,
        calibration: CalibrationSet,
        argument: str,
        start: States,
        images: int,
        generator: torch.Generator,
    ) -> None:
        self.run, self.calibration, self.generator = run, calibration, generator
        self._learned: list[tuple[float, Part]] = []
        judged: dict[tuple[int, int], list[tuple[float, Part]]] = {}  # by image: where all runs are alike, of one seed
        for t in calibration.timesteps:
            learned, held_out = divided(calibration, t, argument)
            for place, own, b in learned:
                self._learned += [(t, Part(place, own[i : i + images], b)) for i in range(0, len(own), images)]
            for place, own, b in held_out:
                for image in own:
                    judged.setdefault((place, image), []).append((t, Part(place, [image], b)))
        self._judged = list(judged.values())
        self._weights, self._started = self._begin(start)
        self._order: list[int] = []

    @torch.no_grad()
    def _begin(self, start: States) -> tuple[dict[float, float], list[list[float]]]:
        """Weights of timesteps, and errors before learning of every image that judges."""
        started = [[float(self._errors(start, each)) for each in image] for image in self._judged]
        logs: dict[float, list[float]] = {t: [] for t in self.calibration.timesteps}
        for image, errors in zip(self._judged, started, strict=True):
            for (t, _), error in zip(image, errors, strict=True):
                logs[t].append(error)
        weights = {t: float(torch.tensor(own, dtype=torch.float64).log().mean().exp()) for t, own in logs.items()}
        mean = sum(weights.values()) / len(weights)
        return {t: weight / mean for t, weight in weights.items()}, started

    @property
    def per_pass(self) -> int:
        """Iterations that see every image that is learned from once."""
        return len(self._learned)

    @property
    def probes(self) -> int:
        """Numbers that `judge` takes, one an image."""
        return len(self._judged)

    def learn(self, states: States, iteration: int) -> Tensor:
        """Loss of an iteration; differentiable in whatever of the states requires gradients."""
        while len(self._order) <= iteration:
            self._order += torch.randperm(self.per_pass, generator=self.generator).tolist()
        timestep, part = self._learned[self._order[iteration]]
        return self._weights[timestep] * self._errors(states, (timestep, part)).log().mean()

    def judge(self, states: States, probe: int) -> Tensor:
        """Error of an image that is never learned from, relative to that before learning."""
        image, started = self._judged[probe], self._started[probe]
        weights = [self._weights[t] for t, _ in image]
        errors = [self._errors(states, each).squeeze() / error for each, error in zip(image, started, strict=True)]
        return (torch.tensor(weights) * torch.stack(errors).cpu()).sum() / sum(weights)

    def _errors(self, states: States, what: tuple[float, Part]) -> Tensor:
        """Mean squared error of every image, ``[B]``."""
        timestep, part = what
        call = part.call(self.calibration, timestep)
        self.run.use(states)
        errors = (call.run(self.run.denoiser) - call.output).square().flatten(1).mean(1)  # [b B]
        return errors.reshape(part.branches, -1).mean(0).clamp(min=LEAST)


def divided(calibration: CalibrationSet, timestep: float, argument: str) -> tuple[list[Part], list[Part]]:
    """The calls at a timestep: what is learned from, and what is held out to judge by.

    Held out are the last images of every batch, so that where all batches of a run hold the same images in the same
    order, nothing of these is seen at any timestep. Of calls with one image some are held out whole; a single image
    serves both.

    Args:
        calibration: recorded calls.
        timestep: one of theirs.
        argument: name of the denoiser's sample argument.
    """
    branches, sizes = [], []
    for position in range(calibration.count(timestep)):  # one call in memory at a time
        call = calibration.call(timestep, position)
        branches.append(call.branches(argument))
        sizes.append(len(call.output) // branches[-1])
    if max(sizes) == 1:
        whole = [Part(place, [0], b) for place, b in enumerate(branches)]
        judged = whole[HELD_OUT - 1 :: HELD_OUT] or whole[-1:]
        return [part for part in whole if part not in judged] or judged, judged
    first = [max(size - max(size // HELD_OUT, 1), 1) for size in sizes]  # held-out image
    learned = [Part(place, list(range(end)), branches[place]) for place, end in enumerate(first)]
    judged = [Part(place, list(range(first[place], size)), branches[place]) for place, size in enumerate(sizes)]
    return learned, [part for part in judged if part.images]
