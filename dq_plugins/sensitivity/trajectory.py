"""Sampling runs read back from a recording: what the sampler did between two denoiser calls.

A recording that says which sampler it is of (`CalibrationSet.sampler`) is followed by that sampler itself, which may
clip its estimate of the image at every step: what is cut off there is no error of the image. Its run ends with the last
sample; otherwise that is not in the recording, and the final sample is the input of the last call. A one-step run of an
unknown sampler ends with its output.

Shapes: ``B`` images; ``N`` rows of a call, 2 B when it is guided; ``C`` channels.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dq_plugins.calibration import CalibrationSet, Call
from dq_plugins.errors import CalibrationError, RegistryError, TimestepError
from dq_plugins.libraries import adapter
from dq_plugins.sensitivity.linear_updates import Update, fit_updates

FOLLOWED = 0.02
"""Relative distance to the recorded samples within which a sampler counts as the one that made them."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One recorded sampling run.

    Attributes:
        calibration: the recording.
        calls: its calls, by `Call.index`, in order.
        argument: name of the denoiser's sample argument.
        updates: one for each step; shared by all runs of one schedule.
        images: images of the run.
        unexplained: share of the sampler's movement that the updates leave to ``r_k``: its own noise, or a sign that
            the sampler is not linear.
        end: final samples ``[B, ...]`` behind the last call, where the sampler is known.
        stepper: the sampler, where it is known and adds no noise (`dq_plugins.passes.steps.stepper.Stepper`).
        rows: of the recorded calls that belong to the run; None: all.
    """

    calibration: CalibrationSet
    calls: tuple[int, ...]
    argument: str
    updates: tuple[Update, ...]
    images: int
    unexplained: float
    end: Tensor | None = None
    stepper: Any = None
    rows: tuple[int, ...] | None = None

    @property
    def steps(self) -> int:
        """Denoiser calls that lead to the final sample."""
        return len(self.updates)

    @property
    def branches(self) -> int:
        """Halves of the batch: 2 with guidance, else 1."""
        return len(self.updates[0].outputs)

    def call(self, step: int) -> Call:
        """The recorded call of a step."""
        (call,) = self.calibration.subset(calls=[self.calls[step]]).calls()
        return call if self.rows is None else call.rows(torch.tensor(self.rows), len(call.output))

    def part(self, images: range) -> Trajectory:
        """The run of some of its images."""
        if len(images) == self.images:
            return self
        rows = [branch * self.images + image for branch in range(self.branches) for image in images]
        kept = tuple(rows if self.rows is None else (self.rows[row] for row in rows))
        return replace(self, images=len(images), rows=kept, end=None if self.end is None else self.end[list(images)])

    def first(self, images: int) -> Trajectory:
        """The run of at most so many of its images."""
        return self.part(range(min(images, self.images)))

    def parts(self, most: int) -> list[Trajectory]:
        """The run in as few parts of about equal size as have at most so many images each."""
        count = -(-self.images // most)
        ends = [self.images * place // count for place in range(count + 1)]
        return [self.part(range(start, end)) for start, end in itertools.pairwise(ends)]

    def final(self) -> Tensor:
        """Final samples of full precision, ``[B, ...]``."""
        return self.after(self.steps - 1)

    def after(self, step: int) -> Tensor:
        """The recorded sample after a step, ``[B, ...]``."""
        if step + 1 < len(self.calls):
            return self.call(step + 1).kwargs[self.argument][: self.images]
        return self.call(step).output[: self.images] if self.end is None else self.end

    def split(self, step: int, probe: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Carry a gradient with respect to the next sample ``[B, ...]`` over a step.

        Returns:
            Gradients with respect to the denoiser's output (its shape) and, by the direct path, to the sample ``[B,
            ...]``.
        """
        if self.stepper is not None:
            return self._pulled(step, probe, output)
        update = self.updates[step]
        onto_output = torch.zeros_like(output)
        for rows, factor in zip(onto_output.split(self.images), update.outputs, strict=True):
            rows[:, : probe.shape[1]] = factor * probe.to(output)
        return onto_output, update.sample * probe

    @torch.enable_grad()
    def _pulled(self, step: int, probe: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        begun = copy.deepcopy(self._begun[step])
        before = (self.call(step).kwargs[self.argument][: self.images] / self.scales[step]).requires_grad_()
        given = output.detach().clone().requires_grad_()
        after = begun.step(step, _guided(self.stepper, given, before.shape[1], self.branches), before)
        onto_output, onto_sample = torch.autograd.grad(
            after, (given, before), probe.to(after), allow_unused=True, materialize_grads=True
        )
        return onto_output, onto_sample

    @cached_property
    def _begun(self) -> list[Any]:
        """The sampler before every step of this run, with what it remembers of the steps before."""
        begun, found = self.stepper.begin(self.calibration.schedule.timesteps), []
        for step in range(self.steps):
            call, scale = self.call(step), float(begun.scale(step, torch.ones(1)))
            found.append(copy.deepcopy(begun))
            sample = call.kwargs[self.argument][: self.images] / scale
            begun.step(step, _guided(self.stepper, call.output, sample.shape[1], self.branches), sample)
        return found

    @cached_property
    def scales(self) -> list[float]:
        """What the sampler multiplies a sample by before the denoiser sees it, by step."""
        if self.stepper is None:
            return [1.0] * self.steps
        begun = self.stepper.begin(self.calibration.schedule.timesteps)
        return [float(begun.scale(step, torch.ones(1))) for step in range(self.steps)]

    def fold(self, rows: Tensor) -> Tensor:
        """Sum over the branches of guidance: ``[N, ...] -> [B, ...]``."""
        return rows.reshape(self.branches, self.images, *rows.shape[1:]).sum(0)

    def per_image(self, values: Tensor) -> Tensor:
        """`fold` for values of rows: ``[P, N] -> [P, B]``; single values ``[P, 1]`` stay."""
        if values.shape[1] != self.branches * self.images:
            return values
        return values.reshape(len(values), self.branches, self.images).sum(1)

    def replay(self, denoise: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        """Repeat the run with another denoiser.

        Args:
            denoise: from the arguments of a call to the first tensor of the output.

        Returns:
            The final samples ``[B, ...]``; in full precision those of `final`.
        """
        if self.stepper is not None:
            return self._resampled(denoise)
        sample = self.call(0).kwargs[self.argument][: self.images]
        for step, update in enumerate(self.updates):
            call = self.call(step)
            rows = sample.repeat(self.branches, *[1] * (sample.dim() - 1))  # [N, C, ...]
            output = denoise({**call.kwargs, self.argument: rows})
            recorded = call.kwargs[self.argument][: self.images]
            # the recorded step, plus what differs from it: r_k never has to be computed
            moved = update.sample * (sample - recorded)  # [B, C, ...]
            # by branch [B, outputs, ...], C of them the mean
            differences = (output - call.output.to(output)).split(self.images)
            for difference, factor in zip(differences, update.outputs, strict=True):
                moved = moved + factor * difference[:, : sample.shape[1]].to(sample)
            sample = self.after(step) + moved
        return sample

    def _resampled(self, denoise: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        begun = self.stepper.begin(self.calibration.schedule.timesteps)
        sample = self.call(0).kwargs[self.argument][: self.images] / self.scales[0]
        for step in range(self.steps):
            scaled = begun.scale(step, sample)
            rows = scaled.repeat(self.branches, *[1] * (sample.dim() - 1))  # [N, C, ...]
            output = denoise({**self.call(step).kwargs, self.argument: rows})
            sample = begun.step(step, _guided(self.stepper, output, sample.shape[1], self.branches), sample)
        return sample


def _guided(stepper: Any, output: Tensor, channels: int, branches: int) -> Tensor:
    """Guided output ``[B, C, ...]`` of an output ``[N, ...]``, without channels of a learned variance."""
    output = output[:, :channels]
    if branches == 1:
        return output
    null, conditional = output.chunk(2)
    return null + (1.0 if stepper.guidance is None else stepper.guidance) * (conditional - null)


def trajectories_of(calibration: CalibrationSet, argument: str) -> list[Trajectory]:
    """Sampling runs of a recording.

    Args:
        calibration: a whole recording (a part of one has no complete runs).
        argument: name of the denoiser's sample argument.

    Returns:
        One trajectory for each complete run of the first schedule.

    Raises:
        CalibrationError: there is no complete run.
    """
    schedule = calibration.schedule.timesteps
    runs = _complete_runs(calibration, schedule)
    if not runs:
        raise CalibrationError(
            f"{calibration.folder} holds no complete sampling run of the {len(schedule)} timesteps of its schedule "
            "with one denoiser call for each, so no final samples can be compared. Record whole runs (guidance in one "
            "batch), or leave the content measure out."
        )
    first = next(calibration.subset(calls=[runs[0][0]]).calls())
    guided = first.branches(argument) == 2
    stepper = _stepper(calibration)
    followed = [_followed(stepper, calibration, run, argument, guided) for run in runs] if stepper is not None else []
    known = bool(followed) and not stepper.stochastic and max(off for _, off in followed) < FOLLOWED
    ends = [end for end, _ in followed] if known else [None] * len(runs)
    updates, unexplained = fit_updates(calibration, runs, argument, guided, ends)
    sizes = [len(next(calibration.subset(calls=run[:1]).calls()).kwargs[argument]) for run in runs]
    return [
        Trajectory(
            calibration,
            tuple(run),
            argument,
            updates,
            n // (2 if guided else 1),
            unexplained,
            end,
            stepper if known else None,
        )
        for run, n, end in zip(runs, sizes, ends, strict=True)
    ]


def _stepper(calibration: CalibrationSet) -> Any:
    """The recorded sampler; None where it is not known, or cannot be begun at the recorded timesteps."""
    described = calibration.sampler
    if described is None:
        return None
    try:
        stepper = adapter(str(described["adapter"])).stepper(described)
        stepper.begin(calibration.schedule.timesteps)
    except (TimestepError, RegistryError):
        return None
    return stepper


def _followed(
    stepper: Any, calibration: CalibrationSet, run: Sequence[int], argument: str, guided: bool
) -> tuple[Tensor, float]:
    """The final samples of a recorded run, and by how much of them the sampler misses recorded samples on the way."""
    begun, sample, off = stepper.begin(calibration.schedule.timesteps), torch.empty(0), 0.0
    for step, index in enumerate(run):  # in order: multistep samplers remember
        (call,) = calibration.subset(calls=[index]).calls()
        given = call.kwargs[argument]
        given = given[: len(given) // (2 if guided else 1)] / float(begun.scale(step, torch.ones(1)))
        if step:
            off = max(off, float((sample - given).norm() / given.norm().clamp(min=1e-12)))
        sample = begun.step(step, _guided(stepper, call.output, given.shape[1], 2 if guided else 1), given)
    return sample, off


def _complete_runs(calibration: CalibrationSet, schedule: tuple[float, ...]) -> list[list[int]]:
    runs: list[list[int]] = []
    run: list[int] = []
    for call in calibration.calls():
        values = {float(t) for t in call.timestep.reshape(-1).tolist()}
        expected = schedule[len(run)] if len(run) < len(schedule) else None
        if values != {expected}:
            run = []
            if values != {schedule[0]}:
                continue
        run.append(call.index)
        if len(run) == len(schedule):
            runs.append(run)
            run = []
    return runs
