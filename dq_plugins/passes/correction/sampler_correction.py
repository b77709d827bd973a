"""Pass ``sampler-correction``: coefficients of the sampler that take account of the quantized denoiser's errors.

At each timestep, over recorded calls, the (guided) output ``y^`` of the quantized denoiser is split into what goes with
the full-precision one and what does not:

    y^ = (1 + k) y + r,        k = <y^, y> / <y, y> - 1,        v = mean r^2

The sampler divides by ``1 + k``. The rest adds ``b^2 v / (1 + k)^2`` to the variance of the next sample, ``b`` being
what a step makes of one unit of output; a sampler that adds noise of standard deviation ``s`` itself adds only
``sqrt(s^2 - b^2 v / (1 + k)^2)``. No weight is touched, and nothing is added to the cost of a step.

``k`` over few images is partly chance: it is shrunk by the share of its square that chance explains. Whether gains are
applied in full, by half or not at all is decided on a recorded run that they were not fitted on.

Source: He et al. 2023 (PTQD), sections 3.2 and 3.3; Q-Sched (arXiv 2509.01624) learns coefficients of few-step samplers
against a metric of images instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dq_plugins.calibration import first_tensor
from dq_plugins.errors import CalibrationError
from dq_plugins.libraries import adapter
from dq_plugins.passes.image_errors import whole_runs
from dq_plugins.plan import QuantPlan, SamplerCorrection, Section
from dq_plugins.quantized.run import planned_run, planned_states
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.sensitivity.trajectory import Trajectory

STRENGTHS = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class CorrectionFindings:
    """How it was fitted.

    Attributes:
        gain: ``k`` as fitted, by step.
        rest: ``v`` over the power of the output, by step.
        strength: share of the gains that is applied.
        errors: image error on the run that was kept back, by strength; empty with a single run.
    """

    gain: tuple[float, ...]
    rest: tuple[float, ...]
    strength: float
    errors: dict[str, float]


@dataclass(frozen=True)
class Fitted:
    """Of every step: ``k``, ``v`` and the mean square of ``y``."""

    gain: tuple[float, ...]
    variance: tuple[float, ...]
    power: tuple[float, ...]


class SamplerCorrecting(Pass):
    """Choose coefficients of the sampler that make up for quantization errors."""

    name = "sampler-correction"
    requires = ("weight-ranges",)
    after = (
        "activation-ranges",
        "bias-correction",
        "bit-allocation",
        "block-reconstruction",
        "exempt-layers",
        "gptq",
        "group-widths",
        "learned-ranges",
        "step-exceptions",
        "timestep-reduction",
    )

    class Options(PassOptions):
        """Options of ``sampler-correction``.

        Attributes:
            runs: recorded sampling runs to fit on; the last of several decides how much is applied.
            noise: let a sampler that adds noise add less.
            optional: leave the sampler alone where the recording does not say which one it is of; the section says
                so, with nothing in it.
        """

        runs: int = Field(8, ge=1)
        noise: bool = True
        optional: bool = False

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Fit, judge, and write.

        Raises:
            CalibrationError: the recording does not say which sampler it is of, or holds no whole run.
            TimestepError: a correction does not fit the sampler; the message names those that it fits.
        """
        o, described = self.options, context.calibration.sampler
        if described is None:
            if o.optional:
                plan.sections[self.name] = Section.of(CorrectionFindings((), (), 0.0, {}))
                return
            raise CalibrationError(
                "pass 'sampler-correction' is about the sampler, and this recording does not say which one it is of: "
                "record with dq_diffusers.recording.sampler, or leave the pass out"
            )
        timesteps = context.calibration.schedule.timesteps
        responses = adapter(str(described["adapter"])).step_responses(described, timesteps)
        runs = whole_runs(context, o.runs)
        runs = [run for run in runs if run.steps == len(timesteps)] or runs
        quantized = planned_run(context.denoiser, plan, whole=True, out_of_range="nearest")
        states = planned_states(quantized, plan)
        with quantized:
            quantized.use(states)
            yield Progress(0, 2, "output errors")
            guidance = described.get("guidance")
            errors = {}
            if len(runs) > 1:
                part = fit(context.denoiser, runs[:-1], guidance)
                errors = {s: _replayed(context.denoiser, runs[-1], timesteps, part.gain, s) for s in STRENGTHS}
            whole = fit(context.denoiser, runs, guidance)
        strength = min(errors, key=lambda s: (errors[s], s)) if errors else 1.0
        gain = tuple(strength * k + 0.0 for k in whole.gain)  # no negative zeros
        noise = _noise(whole, gain, responses) if o.noise else (0.0,) * len(gain)
        steps = timesteps[: len(gain)]
        name = str(described["scheduler"]["_class_name"])
        plan.sampler_correction = SamplerCorrection(name, steps, gain, noise)
        rest = tuple(v / max(p, 1e-30) for v, p in zip(whole.variance, whole.power, strict=True))
        found = CorrectionFindings(whole.gain, rest, strength, {f"{s:g}": e for s, e in errors.items()})
        plan.sections[self.name] = Section.of(found)
        yield Progress(2, 2)


@torch.no_grad()
def fit(denoiser: nn.Module, runs: Sequence[Trajectory], guidance: float | None) -> Fitted:
    """The two parts of the errors that a denoiser makes on recorded calls, step by step.

    Args:
        denoiser: what it computes now is compared with what was recorded.
        runs: recorded sampling runs of one schedule.
        guidance: weight of classifier-free guidance, where calls are guided in one batch.
    """
    gains, variances, powers = [], [], []
    for step in range(min(len(run.calls) for run in runs)):
        pairs = [_outputs(denoiser, run, step, guidance) for run in runs]
        y, found = (torch.cat(part).flatten(1).double() for part in zip(*pairs, strict=True))  # [B, D] each
        power = y.square().sum(1)  # [B]
        own = (found * y).sum(1) / power.clamp(min=1e-30) - 1
        k = float((own * power).sum() / power.sum().clamp(min=1e-30))
        chance = float(own.var(correction=1)) / len(own) if len(own) > 1 else 0.0
        k *= max(1 - chance / k**2, 0.0) if k else 0.0
        gains.append(max(min(k, 0.5), -0.5))
        variances.append(float((found - (1 + k) * y).square().mean()))
        powers.append(float(y.square().mean()))
    return Fitted(tuple(gains), tuple(variances), tuple(powers))


def _outputs(denoiser: nn.Module, run: Trajectory, step: int, guidance: float | None) -> tuple[Tensor, Tensor]:
    call = run.call(step)
    channels = call.kwargs[run.argument].shape[1]
    found = first_tensor(denoiser(**call.kwargs))
    return tuple(_guided(each[:, :channels], run.branches, guidance) for each in (call.output, found))  # type: ignore[return-value]


def _guided(output: Tensor, branches: int, guidance: float | None) -> Tensor:
    if branches == 1:
        return output
    null, conditional = output.chunk(2)
    return null + (1.0 if guidance is None else guidance) * (conditional - null)


@torch.no_grad()
def _replayed(
    denoiser: nn.Module, run: Trajectory, timesteps: Sequence[float], gain: Sequence[float], strength: float
) -> float:
    """Mean square error of a run's final samples with a share of the gains taken off."""
    by_timestep = dict(zip(timesteps, gain, strict=False))

    def denoise(kwargs: Mapping[str, Any]) -> Tensor:
        t = float(torch.as_tensor(kwargs[run.calibration.timestep_argument]).flatten()[0])
        return first_tensor(denoiser(**kwargs)) / (1 + strength * by_timestep.get(t, 0.0))

    return float((run.replay(denoise) - run.final()).double().square().mean())


def _noise(fitted: Fitted, gain: Sequence[float], responses: Sequence[tuple[float, float]]) -> tuple[float, ...]:
    """Standard deviation to leave out of the sampler's own noise, by step."""
    left_out = []
    for k, v, (b, s) in zip(gain, fitted.variance, responses, strict=False):
        left_out.append(s - max(s * s - b * b * v / (1 + k) ** 2, 0.0) ** 0.5)
    return tuple(left_out)
