"""Linearised sensitivity: what every layer, operand and width changes at once, from a few backward passes.

With a random ``v`` of independent signs on the output of the denoiser, or on the final sample of a run,

    E_v (v . J d)^2 = |J d|^2                    and          v . J d = (J' v) . d,

see `dq_plugins.sensitivity.jacobian`. So ``P`` probes on a call cost ``P`` backward passes, whatever the number of
layers, and one pass of the layers for each width, where the naive method repeats the call for each layer and width.
The relative standard deviation of an estimate over ``n`` probes and samples is about ``sqrt(2 / n)``.

Large errors (2 bits) are not linear; `dq_plugins.sensitivity.sensitivity_table` checks and corrects it on exact
measurements. The estimate is that of Hutchinson (1990), applied to ``J d d' J'``.

Shapes: ``P`` probes, ``B`` images or samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dq_plugins.calibration import CalibrationSet
from dq_plugins.errors import DQError
from dq_plugins.quantized.candidates import AnyEntry, Candidates
from dq_plugins.sensitivity.jacobian import JacobianProbe, per_sample, signs
from dq_plugins.sensitivity.measure import BACKWARD, FORWARD, Sums
from dq_plugins.sensitivity.similarity import SsimForm
from dq_plugins.sensitivity.trajectory import Trajectory


@dataclass
class QualityProbes:
    """Noise power that each entry adds to the denoiser's output, one recorded call at a time.

    Attributes:
        denoiser: full precision.
        candidates: the quantizers.
        calibration: recorded calls.
        probes: backward passes for each call.
        seed: of the probes.
    """

    denoiser: nn.Module
    candidates: Candidates
    calibration: CalibrationSet
    probes: int = 4
    seed: int = 0

    def units(self) -> list[str]:
        """One unit of work for each recorded call."""
        return [str(call.index) for call in self.calibration.calls()]

    def __call__(self, unit: str) -> Sums:
        """Estimated ``sum (y - y^)^2`` by entry, and the signal ``sum y^2``, of one call."""
        (call,) = self.calibration.subset(calls=[int(unit)]).calls()
        with JacobianProbe(self.denoiser, self.candidates).open() as jacobian:
            output = jacobian.run(call.kwargs)
            cotangents = signs((self.probes, *output.shape), generator(self.seed, unit)).to(output)
            found, _ = jacobian.backward(output, cotangents, call.timestep)
        sums: Sums = {"calls": cost_of(self.candidates, self.probes)}
        sums["signal"] = float(output.detach().double().square().sum())
        for entry, moved in found.items():
            sums[str(entry)] = float(per_sample(moved, len(output)).square().sum()) / self.probes
        return sums


@dataclass
class ContentProbes:
    """Loss of similarity of the final sample that each entry causes, one recorded sampling run at a time.

    The probe starts at the final sample, in the coordinates in which ``1 - SSIM`` is a sum of squares, and is carried
    back through the run.

    Attributes:
        denoiser: full precision.
        candidates: the quantizers.
        trajectories: recorded sampling runs.
        probes: backward passes through a run for each of the two parts (structure, texture).
        seed: of the probes.
    """

    denoiser: nn.Module
    candidates: Candidates
    trajectories: Sequence[Trajectory]
    probes: int = 4
    seed: int = 0

    def units(self) -> list[str]:
        """One unit of work for each sampling run."""
        return [str(index) for index in range(len(self.trajectories))]

    def __call__(self, unit: str) -> Sums:
        """Estimated loss of structure (``<entry>#structure``) and of texture (``#texture``), summed over images."""
        run = self.trajectories[int(unit)]
        final, draw = run.final(), generator(self.seed, unit)
        form = SsimForm(final)
        sums: Sums = {"signal": float(final.shape[0]), "calls": 0.0}
        for part in ("structure", "texture"):
            probes = torch.stack([form.cotangent(part, signs(final.shape, draw)) for _ in range(self.probes)])
            for entry, moved in carried_back(self.denoiser, self.candidates, run, probes).items():
                sums[f"{entry}#{part}"] = float(moved.square().sum()) / self.probes
            sums["calls"] += run.steps * cost_of(self.candidates, self.probes)
        return sums


def carried_back(
    denoiser: nn.Module, candidates: Candidates, run: Trajectory, probes: Tensor, *, by_group: bool = False
) -> dict[AnyEntry, Tensor]:
    """What each entry moves ``probe . final sample`` by, when it is quantized during the whole run; to first order.

    A probe is carried back through the sampler, whose steps are read off the recording, and through the denoiser. At
    every step it meets what the entry changes there, and all steps add up: in amplitude where the changes are alike.

    Args:
        denoiser: full precision.
        candidates: the quantizers.
        run: a recorded sampling run.
        probes: ``[P, B, ...]``, of the final sample's shape each.
        by_group: inputs quantized in one timestep group alone, each by itself: entries are `GroupEntry` then.

    Returns:
        By entry, float64 ``[P, B]``; ``[P, 1]`` where what images have of it cannot be told apart.
    """
    total: dict[AnyEntry, Tensor] = {}
    jacobian = JacobianProbe(denoiser, candidates)
    for step in reversed(range(run.steps)):
        call = run.call(step)
        sample = call.kwargs[run.argument].clone().requires_grad_()  # [N, ...]
        with jacobian.open():
            output = jacobian.run({**call.kwargs, run.argument: sample})
            onto_output, onto_sample = zip(*(run.split(step, probe, output.detach()) for probe in probes), strict=True)
            found, gradients = jacobian.backward(output, torch.stack(onto_output), call.timestep, sample)
        timestep = float(call.timestep.flatten()[0])
        for each, moved in found.items():
            entry = candidates.in_group(each, timestep) if by_group else each
            known, moved = total.get(entry), run.per_image(per_sample(moved, len(output)))
            if known is not None and known.shape != moved.shape:
                known, moved = (each.sum(1, keepdim=True) for each in (known, moved))
            total[entry] = moved if known is None else known + moved
        if gradients is None:
            raise DQError("the denoiser's output does not depend on its sample: nothing to carry back")
        scale = run.scales[step]
        probes = torch.stack([direct + scale * run.fold(g) for direct, g in zip(onto_sample, gradients, strict=True)])
    return total


def cost_of(candidates: Candidates, probes: int) -> float:
    """Cost of a call with so many probes, in denoiser calls: backward passes, and the layers at each width."""
    widths = max((len(each) for each in candidates.weights.values()), default=0)
    return FORWARD * (1 + widths) + BACKWARD * probes


def generator(seed: int, unit: str) -> torch.Generator:
    """Random numbers of one unit of work."""
    return torch.Generator().manual_seed((seed * 1_000_003 + int(unit)) % 2**63)
