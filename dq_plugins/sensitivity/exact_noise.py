"""Exact sensitivity: quantize one operand of one layer, and run. The naive method; estimates are checked on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dq_plugins import registry
from dq_plugins.calibration import CalibrationSet, Call, first_tensor
from dq_plugins.errors import DQError
from dq_plugins.quantized.candidates import Candidates, Entry
from dq_plugins.quantized.network import SuperNetwork
from dq_plugins.quantized.width import widths_of
from dq_plugins.sensitivity.measure import FORWARD, Sums
from dq_plugins.sensitivity.trajectory import Trajectory


def _by_unit(candidates: Candidates) -> dict[str, Entry]:
    return {str(entry): entry for entry in candidates.entries()}


def output_noise(
    denoiser: nn.Module, candidates: Candidates, entries: Sequence[Entry], calibration: CalibrationSet
) -> tuple[float, float]:
    """Error of the denoiser's output over recorded calls with some entries quantized together.

    Returns:
        ``sum (y - y^)^2`` and ``sum y^2``.
    """
    with SuperNetwork(denoiser, candidates, calibration.timestep_argument) as network:
        network.switch(widths_of(entries))
        return noise_and_signal(denoiser, calibration.calls())


def noise_and_signal(denoiser: nn.Module, calls: Iterable[Call]) -> tuple[float, float]:
    """``sum (y - y^)^2`` and ``sum y^2`` of the output that the denoiser now gives to recorded calls, in float64."""
    noise = signal = 0.0
    with torch.no_grad():
        for call in calls:
            reference = call.output.double()
            noise += float((call.run(denoiser).double() - reference).square().sum())
            signal += float(reference.square().sum())
    return noise, signal


def final_samples(
    denoiser: nn.Module, candidates: Candidates, entries: Sequence[Entry], trajectory: Trajectory
) -> torch.Tensor:
    """Final samples ``[B, ...]`` of a recorded run, repeated with some entries quantized together."""
    argument = trajectory.calibration.timestep_argument
    with SuperNetwork(denoiser, candidates, argument) as network, torch.no_grad():
        network.switch(widths_of(entries))
        return trajectory.replay(lambda kwargs: first_tensor(denoiser(**kwargs)))


@torch.no_grad()
def replayed_errors(denoiser: nn.Module, trajectories: Sequence[Trajectory]) -> Tensor:
    """Mean square error of every final sample of recorded runs, repeated with what the denoiser computes now: float64
    ``[images]``."""
    found = [run.replay(lambda kwargs: first_tensor(denoiser(**kwargs))) - run.final() for run in trajectories]
    errors = [wrong.double().square().flatten(1).mean(1).cpu() for wrong in found]
    return torch.cat([torch.zeros(0, dtype=torch.float64), *errors])


@dataclass
class ExactQuality:
    """Noise power of the denoiser's output with one entry quantized, over recorded calls.

    Attributes:
        denoiser: full precision.
        candidates: the quantizers.
        calibration: recorded calls.
    """

    denoiser: nn.Module
    candidates: Candidates
    calibration: CalibrationSet

    def units(self) -> list[str]:
        """One unit of work for each entry."""
        return list(_by_unit(self.candidates))

    def __call__(self, unit: str) -> Sums:
        """``sum (y - y^)^2`` of one entry, and the signal ``sum y^2``."""
        entry = _by_unit(self.candidates)[unit]
        noise, signal = output_noise(self.denoiser, self.candidates, [entry], self.calibration)
        return {unit: noise, "signal": signal, "calls": FORWARD * len(self.calibration)}


@dataclass
class ExactContent:
    """Loss of similarity of the final samples with one entry quantized during the whole sampling run, same seeds.

    Attributes:
        denoiser: full precision.
        candidates: the quantizers.
        trajectories: recorded sampling runs.
        metric: registered metric of the final samples; ``"ssim"``, or a feature distance of the user's.
    """

    denoiser: nn.Module
    candidates: Candidates
    trajectories: Sequence[Trajectory]
    metric: str = "ssim"

    def units(self) -> list[str]:
        """One unit of work for each entry."""
        return list(_by_unit(self.candidates))

    def __call__(self, unit: str) -> Sums:
        """Loss of one entry, summed over images: ``1 - SSIM``, or the metric turned so that 0 is best."""
        metric = registry.function("metric", self.metric)
        loss = images = calls = 0.0
        entry = _by_unit(self.candidates)[unit]
        for trajectory in self.trajectories:
            reference = trajectory.final()
            value = metric(reference, final_samples(self.denoiser, self.candidates, [entry], trajectory))
            loss += (_best(metric, reference) - value if metric.higher_is_better else value) * trajectory.images
            images += trajectory.images
            calls += trajectory.steps * FORWARD
        return {unit: loss, "signal": images, "calls": calls}


def _best(metric: object, reference: torch.Tensor) -> float:
    """Value of equal images: 1 for SSIM."""
    best = float(metric(reference, reference))  # type: ignore[operator]
    if best == float("inf"):
        raise DQError(
            "a content metric must have a finite value for equal images, from which the loss is counted; "
            "this one is infinite. Use 'ssim', or a distance (lower is better)."
        )
    return best
