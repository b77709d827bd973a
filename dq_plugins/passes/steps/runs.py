"""Recorded sampling runs, sampled again over other timesteps with another denoiser.

Shapes: ``B`` images; ``N`` rows of a call, 2 B when it is guided; ``S`` recorded steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dq_plugins.calibration import CalibrationSet
from dq_plugins.errors import CalibrationError
from dq_plugins.graph.arguments import map_leaves, named_leaves
from dq_plugins.passes.steps.stepper import SamplingRun, Stepper, stepper_of
from dq_plugins.sensitivity.trajectory import Trajectory, trajectories_of

REPLAY_TOLERANCE = 0.02
"""Relative distance to the recorded samples within which a sampler counts as the one that made them. Not less, because
DDIM in diffusers goes to ``t - 1000 // steps``, not quite the next timestep where that does not divide (0.2 % off
at 12 steps); here every step goes to the next one."""


@dataclass(frozen=True, eq=False)
class Run:
    """One recorded run that can be sampled again. Picklable; made by `runs_of`.

    Attributes:
        trajectory: what was recorded.
        kwargs: arguments of its first call.
        noise: what it started from, ``[B, ...]``, with standard deviation 1.
        final: full-precision result over all recorded timesteps, ``[B, ...]``.
    """

    trajectory: Trajectory
    kwargs: dict[str, Any]
    noise: Tensor
    final: Tensor

    @property
    def guided(self) -> bool:
        """Calls hold the unconditional half first."""
        return self.trajectory.branches > 1

    @property
    def changing(self) -> tuple[str, str]:
        """Names of the arguments that change from step to step: the sample and the timestep."""
        return self.trajectory.argument, self.trajectory.calibration.timestep_argument

    @property
    def images(self) -> int:
        """``B``."""
        return len(self.noise)

    def first(self, images: int) -> Run:
        """The run restricted to its first images."""
        return self if images >= self.images else self.part(0, images)

    def part(self, start: int, stop: int) -> Run:
        """The run restricted to some of its images; arguments with an entry for each row are cut alike."""
        rows = torch.arange(start, stop)
        batch = self.images * (2 if self.guided else 1)
        index = torch.cat([rows, rows + self.images]) if self.guided else rows

        def cut(_: str, value: Any) -> Any:
            return value[index] if isinstance(value, Tensor) and value.dim() and len(value) == batch else value

        return replace(self, kwargs=map_leaves(self.kwargs, cut), noise=self.noise[rows], final=self.final[rows])

    def sample(
        self, stepper: Stepper, timesteps: Sequence[float], denoise: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        """Sample from the recorded noise; the final sample ``[B, ...]``.

        Args:
            stepper: the sampler.
            timesteps: descending.
            denoise: from the arguments of a call to the first tensor of the output.
        """
        run = stepper.begin(timesteps)
        sample = self.noise * run.spread
        for step, t in enumerate(timesteps):
            output = self.guide(denoise(self.arguments(run.scale(step, sample), t)), stepper.guidance)
            sample = run.step(step, output, sample)
        return sample

    def arguments(self, scaled: Tensor, timestep: float) -> dict[str, Any]:
        """Arguments of a call for ``scaled`` ``[B, ...]``."""
        rows = torch.cat([scaled, scaled]) if self.guided else scaled
        sample_name, timestep_name = self.changing
        told = self.kwargs[timestep_name]
        t = torch.full_like(told, timestep) if isinstance(told, Tensor) else type(told)(timestep)
        return {**self.kwargs, sample_name: rows, timestep_name: t}

    def guide(self, output: Tensor, guidance: float | None) -> Tensor:
        """Guided output ``[B, ...]`` of an output ``[N, ...]``: ``null + w (conditional - null)``."""
        output = output[:, : self.noise.shape[1]]
        if not self.guided:
            return output
        null, conditional = output.chunk(2)
        return null + (1.0 if guidance is None else guidance) * (conditional - null)


def runs_of(calibration: CalibrationSet, argument: str) -> tuple[Stepper, list[Run]]:
    """The sampler of a recording, and its runs.

    Every run is repeated with the recorded outputs first: a sampler that does not arrive at the recorded samples is not
    the one that made them. The recording is a whole one; ``argument`` names the denoiser's sample.

    Raises:
        CalibrationError: there is no complete run, conditions change from step to step, or the sampler is another one.
        TimestepError: the sampler takes no custom timesteps.
    """
    trajectories = trajectories_of(calibration, argument)
    stepper = stepper_of(calibration, trajectories[0])
    return stepper, [_run(t, stepper) for t in trajectories]


def _run(trajectory: Trajectory, stepper: Stepper) -> Run:
    first = trajectory.call(0)
    begun = stepper.begin(trajectory.calibration.schedule.timesteps)
    noise = first.kwargs[trajectory.argument][: trajectory.images] / (_factor(begun, 0) * begun.spread)
    run = Run(trajectory, first.kwargs, noise, noise)
    return replace(run, final=recorded_path(run, stepper)[0][-1])


def _factor(run: SamplingRun, step: int) -> float:
    return float(run.scale(step, torch.ones(1)))


def recorded_path(run: Run, stepper: Stepper) -> tuple[list[Tensor], list[Tensor]]:
    """Repeat a run with its recorded outputs.

    Returns:
        Samples before every step, and the final one: ``S + 1`` tensors ``[B, ...]``, as the sampler holds them; and
        outputs of every step, guided: ``S`` tensors ``[B, ...]``.

    Raises:
        CalibrationError: the samples are not the recorded ones (a sampler that adds noise is not compared), or a
            condition changes from step to step.
    """
    trajectory = run.trajectory
    timesteps = trajectory.calibration.schedule.timesteps
    begun = stepper.begin(timesteps)
    samples, outputs = [run.noise * begun.spread], []
    for step in range(len(timesteps)):
        call = trajectory.call(step)
        _same_conditions(run, call.kwargs, call.index)
        recorded = call.kwargs[trajectory.argument][: run.images] / _factor(begun, step)
        off = float((samples[-1] - recorded).norm() / recorded.norm().clamp(min=1e-12))
        if off > REPLAY_TOLERANCE and not stepper.stochastic:
            raise CalibrationError(
                f"the sampler that {trajectory.calibration.folder} names does not arrive at the recorded samples: at "
                f"timestep {timesteps[step]:g} they differ by {off:.1%}. The pipeline changes samples or outputs in a "
                "way of its own (rescaled guidance, another order of the two halves), which this search cannot repeat."
            )
        outputs.append(run.guide(call.output, stepper.guidance))
        samples[-1] = recorded
        samples.append(begun.step(step, outputs[-1], recorded))
    return samples, outputs


def _same_conditions(run: Run, kwargs: dict[str, Any], index: int) -> None:
    before, now = (
        {n: v for n, v in named_leaves(each) if isinstance(v, Tensor) and n.split(".")[0] not in run.changing}
        for each in (run.kwargs, kwargs)
    )
    names = sorted(before.keys() | now.keys())
    different = [n for n in names if n not in before or n not in now or not torch.equal(before[n], now[n])]
    if different:
        raise CalibrationError(
            f"the condition {different[0]!r} of recorded call {index} is not that of the first call of its run, so "
            "runs over other timesteps cannot be made from this recording"
        )


def split_runs(runs: Sequence[Run], images: int) -> tuple[list[Run], list[Run]]:
    """The first so many images of all runs, and the others."""
    first: list[Run] = []
    others: list[Run] = []
    for run in runs:
        here = min(images, run.images)
        images -= here
        first += [run.part(0, here)] if here else []
        others += [run.part(here, run.images)] if here < run.images else []
    return first, others
