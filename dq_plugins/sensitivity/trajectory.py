"""Sampling runs read back from a recording: what the sampler did between two denoiser calls.

Samplers whose next sample is linear in the current one and in the denoiser's output (DDIM, DDPM, Euler, rectified flow,
any prediction type, with classifier-free guidance in one batch or without) satisfy

    x_{k+1} = a_k x_k + b_k y_k + r_k                (guided: b_k y_k + c_k y'_k, for the two halves of the batch)

with ``r_k`` the noise a stochastic sampler adds. ``a_k``, ``b_k``, ``c_k`` are found by least squares over all recorded
runs, and ``r_k`` is what remains. With them a run can be repeated with a quantized denoiser from the recording alone
(same seeds, same noise; in full precision it gives the recorded samples), and a gradient can be carried back through
it.

The final sample is the input of the last call: what the sampler makes of the last output is not in the recording. A
one-step run ends with its output.

Shapes: ``B`` images; ``N`` rows of a call, 2 B when it is guided; ``C`` channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dq_plugins.calibration import CalibrationSet, Call
from dq_plugins.errors import CalibrationError


@dataclass(frozen=True)
class Update:
    """One step of the sampler: ``x' = sample * x + sum_i outputs[i] * y_i``; one output, or two when guided."""

    sample: float
    outputs: tuple[float, ...]


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
    """

    calibration: CalibrationSet
    calls: tuple[int, ...]
    argument: str
    updates: tuple[Update, ...]
    images: int
    unexplained: float

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
        return call

    def final(self) -> Tensor:
        """Final samples of full precision, ``[B, ...]``."""
        if len(self.calls) == 1:
            return self.call(0).output[: self.images]
        return self.call(self.steps).kwargs[self.argument][: self.images]

    def split(self, step: int, probe: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Carry a gradient with respect to the next sample ``[B, ...]`` over a step.

        Returns:
            Gradients with respect to the denoiser's output (its shape) and, by the direct path, to the sample ``[B,
            ...]``.
        """
        update = self.updates[step]
        onto_output = torch.zeros_like(output)
        for rows, factor in zip(onto_output.split(self.images), update.outputs, strict=True):
            rows[:, : probe.shape[1]] = factor * probe.to(output)
        return onto_output, update.sample * probe

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
        sample = self.call(0).kwargs[self.argument][: self.images]
        for step, update in enumerate(self.updates):
            call = self.call(step)
            rows = sample.repeat(self.branches, *[1] * (sample.dim() - 1))  # [N, C, ...]
            output = denoise({**call.kwargs, self.argument: rows})
            following = self.call(step + 1).kwargs[self.argument] if step + 1 < len(self.calls) else call.output
            recorded = call.kwargs[self.argument][: self.images]
            # the recorded step, plus what differs from it: r_k never has to be computed
            moved = update.sample * (sample - recorded)  # [B, C, ...]
            # by branch [B, outputs, ...], C of them the mean
            differences = (output - call.output.to(output)).split(self.images)
            for difference, factor in zip(differences, update.outputs, strict=True):
                moved = moved + factor * difference[:, : sample.shape[1]].to(sample)
            sample = following[: self.images] + moved
        return sample


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
    guided = _is_guided(first.kwargs[argument])
    updates, unexplained = _fit(calibration, runs, argument, guided)
    sizes = [len(next(calibration.subset(calls=run[:1]).calls()).kwargs[argument]) for run in runs]
    return [
        Trajectory(calibration, tuple(run), argument, updates, n // (2 if guided else 1), unexplained)
        for run, n in zip(runs, sizes, strict=True)
    ]


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


def _is_guided(sample: Tensor) -> bool:
    half = len(sample) // 2
    return len(sample) % 2 == 0 and torch.equal(sample[:half], sample[half:])


def _fit(
    calibration: CalibrationSet, runs: list[list[int]], argument: str, guided: bool
) -> tuple[tuple[Update, ...], float]:
    """Least squares for every step over all runs, by normal equations in float64."""
    if len(runs[0]) == 1:
        return (Update(0.0, (1.0, 0.0) if guided else (1.0,)),), 0.0
    terms = 3 if guided else 2
    gram = torch.zeros(len(runs[0]) - 1, terms, terms, dtype=torch.float64)  # [steps, terms, terms]
    target = torch.zeros(len(runs[0]) - 1, terms, dtype=torch.float64)  # [steps, terms]
    power = moved = 0.0
    for run in runs:
        for step, (columns, following) in enumerate(_pairs(calibration, run, argument, guided)):
            gram[step] += columns @ columns.T
            target[step] += columns @ following
            power += float(following.square().sum())
            moved += float((following - columns[0]).square().sum())
    found = torch.linalg.pinv(gram, hermitian=True) @ target[..., None]  # [steps, terms, 1]: a, b (and c)
    explained = float((found.mT @ target[..., None]).sum())
    updates = tuple(Update(float(f[0]), tuple(float(v) for v in f[1:])) for f in found.squeeze(-1))
    return updates, max(power - explained, 0.0) / max(moved, 1e-300)


def _pairs(calibration: CalibrationSet, run: list[int], argument: str, guided: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Regressors ``[terms, n]`` and next sample ``[n]`` of every step of a run."""
    before: Call | None = None
    for index in run:
        (call,) = calibration.subset(calls=[index]).calls()
        if before is not None:
            sample = before.kwargs[argument].double()
            output = before.output.double()[:, : sample.shape[1]]  # without channels of a learned variance
            images = len(sample) // (2 if guided else 1)
            columns = [sample[:images], *output.split(images)]
            yield torch.stack([c.reshape(-1) for c in columns]), call.kwargs[argument].double()[:images].reshape(-1)
        before = call
