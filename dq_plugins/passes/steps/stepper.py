"""What a sampler does between two denoiser calls, over any timesteps, and who knows it.

A recording that says which sampler it is of (``CalibrationSet.sampler``) is repeated by the adapter it names. Any other
one is known from its recorded steps ``x' = a_k x + b_k y_k`` (`dq_plugins.sensitivity.trajectory`) alone. A step from
recorded timestep i to j holds constant what the sampler holds constant within one step:

- the output itself, for noise prediction, sample prediction and flows:

      A = prod a_k,        B = sum_k b_k prod_{m > k} a_m

- the pair (sample, velocity) turning as one, for velocity prediction on a variance-preserving schedule, where every
  step is a rotation, ``a_k = cos d_k`` and ``b_k = sin d_k``; then ``A = cos sum d_k`` and ``B = sin sum d_k``.

The first is exact for DDIM, Euler and rectified flow, the second for DDIM with ``v``. The recording ends with its last
denoiser call, so the last step goes to the sample of that call. Thresholding of samples is not linear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from dq_plugins.calibration import CalibrationSet
from dq_plugins.errors import TimestepError
from dq_plugins.libraries import adapter
from dq_plugins.sensitivity.trajectory import Trajectory

UNEXPLAINED = 1e-3
"""Share of the sampler's movement that may stay unexplained; beyond it the sampler is not linear, or adds noise."""


class SamplingRun(Protocol):
    """One run over given timesteps; steps are taken in order."""

    @property
    def spread(self) -> float:
        """Standard deviation of the sample that a run starts from."""
        ...

    def scale(self, step: int, sample: Tensor) -> Tensor:
        """What the denoiser is given for a sample: a multiple of it."""
        ...

    def step(self, step: int, output: Tensor, sample: Tensor) -> Tensor:
        """The next sample ``[B, ...]`` from the (guided) output; after the last step the final one."""
        ...


class Stepper(Protocol):
    """A sampler that can visit custom timesteps. Picklable.

    Attributes:
        guidance: weight of classifier-free guidance; None where the recording is not guided.
    """

    guidance: float | None

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise of their own."""
        ...

    @property
    def end(self) -> float:
        """The timestep at which a run ends; only larger ones are visited."""
        ...

    def own(self, steps: int) -> tuple[float, ...]:
        """The timesteps that the sampler would take by itself for so many steps, descending."""
        ...

    def begin(self, timesteps: Sequence[float]) -> SamplingRun:
        """A run over descending timesteps; raises `TimestepError` where it cannot visit them."""
        ...


@dataclass(frozen=True)
class LinearStepper:
    """Steps composed of recorded ones; made by `of`.

    Attributes:
        timesteps: recorded timesteps, in order.
        factors: ``(a_k, b_k)`` of every recorded step but the last.
        rotation: every step turns sample and output as one.
    """

    timesteps: tuple[float, ...]
    factors: tuple[tuple[float, float], ...]
    guidance: float | None = None
    rotation: bool = False
    stochastic: bool = False

    @classmethod
    def of(cls, trajectory: Trajectory) -> LinearStepper:
        """The sampler of a recorded run.

        Raises:
            TimestepError: it adds noise, is not linear, or its timesteps do not descend.
        """
        timesteps = trajectory.calibration.schedule.timesteps
        if trajectory.unexplained > UNEXPLAINED:
            raise TimestepError(
                f"{trajectory.unexplained:.1%} of what the sampler of {trajectory.calibration.folder} does is not "
                "linear in sample and output (it adds noise, or cuts values off), so it cannot be repeated over other "
                "timesteps from the recording alone. Record with dq_diffusers.recording.sampler, which says what it is."
            )
        if any(a <= b for a, b in pairwise(timesteps)):
            raise TimestepError(f"timesteps can be left out of a descending schedule only; recorded were {timesteps}")
        sums = [(u.sample, sum(u.outputs)) for u in trajectory.updates]
        strengths = [u.outputs[-1] / sum(u.outputs) for u in trajectory.updates if sum(u.outputs)]
        guidance = sum(strengths) / len(strengths) if trajectory.branches > 1 and strengths else None
        rotation = len(timesteps) > 1 and all(abs(math.hypot(a, b) - 1) < UNEXPLAINED for a, b in sums)
        return cls(timesteps, tuple(sums), guidance, rotation)

    @property
    def end(self) -> float:
        """The last recorded timestep: where the samples that are compared were."""
        return self.timesteps[-1] if len(self.timesteps) > 1 else -1.0

    def own(self, steps: int) -> tuple[float, ...]:
        """Recorded timesteps, evenly spread, the first among them."""
        count = max(len(self.timesteps) - 1, 1)
        return tuple(self.timesteps[i * count // steps] for i in range(steps))

    def begin(self, timesteps: Sequence[float]) -> LinearRun:
        """A run over some of the recorded timesteps."""
        unknown = [t for t in timesteps if t not in self.timesteps]
        if unknown:
            raise TimestepError(
                f"timestep {unknown[0]:g} was not recorded, and this sampler is known at recorded timesteps only"
            )
        places = [self.timesteps.index(t) for t in timesteps]
        return LinearRun(tuple(self._between(i, j) for i, j in zip(places, [*places[1:], None], strict=True)))

    def _between(self, start: int, end: int | None) -> tuple[float, float]:
        """``(A, B)`` from one recorded timestep to another, or to the last one."""
        steps = self.factors[start:end]
        if self.rotation:
            angle = sum(math.atan2(b, a) for a, b in steps)
            return math.cos(angle), math.sin(angle)
        product, total = 1.0, 0.0
        for a, b in steps:
            product, total = product * a, total * a + b
        return product, total


@dataclass(frozen=True)
class LinearRun:
    """One run, with ``(A, B)`` of every step; made by `LinearStepper.begin`."""

    factors: tuple[tuple[float, float], ...]
    spread: float = 1.0

    def scale(self, step: int, sample: Tensor) -> Tensor:
        """The sample as it is."""
        return sample

    def step(self, step: int, output: Tensor, sample: Tensor) -> Tensor:
        """``A x + B y``."""
        a, b = self.factors[step]
        return a * sample + b * output


def stepper_of(calibration: CalibrationSet, trajectory: Trajectory) -> Stepper:
    """The sampler of a recording, of which one run is given.

    Raises:
        RegistryError: the adapter that the recording names is not installed.
        TimestepError: the sampler takes no custom timesteps.
    """
    described = calibration.sampler
    if described is None:
        return LinearStepper.of(trajectory)
    return adapter(str(described["adapter"])).stepper(described)
