"""What a sampler does between two denoiser calls, over any timesteps, and who knows it.

A recording that says which sampler it is of (``CalibrationSet.sampler``) is repeated by the adapter it names. For any
other one `LinearStepper` reads the sampler off the recorded samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dq_plugins.calibration import CalibrationSet
from dq_plugins.libraries import adapter
from dq_plugins.sensitivity.trajectory import Trajectory


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


def stepper_of(calibration: CalibrationSet, trajectory: Trajectory) -> Stepper:
    """The sampler of a recording.

    Args:
        calibration: the recording.
        trajectory: one of its runs.

    Raises:
        RegistryError: the adapter that the recording names is not installed.
        TimestepError: the sampler takes no custom timesteps.
    """
    described = calibration.sampler
    if described is None:
        from dq_plugins.passes.steps.linear import LinearStepper

        return LinearStepper.of(trajectory)
    return adapter(str(described["adapter"])).stepper(described)
