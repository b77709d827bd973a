"""A diffusers scheduler that corrects what a quantized denoiser gives it, as a plan says.

    pipe = correct_sampler(pipe, plan)

The scheduler stays the one it is: its ``step`` divides the denoiser's (guided) output by ``1 + k``, lets the class's
own step run, and takes off as much of the noise that it added as the quantized denoiser brought along. A scheduler made
anew from its config has no correction: call it again.

Schedulers that fit: those whose step uses one output at one timestep, `FITTED`; those among them that add noise of the
same shape as the output, which can be drawn again from the generator, `NOISY`. Solvers that evaluate the denoiser twice
a step, or at timesteps of their own, are refused by name.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dq_diffusers.host import diffusers_attribute
from dq_plugins.errors import TimestepError
from dq_plugins.plan import QuantPlan, SamplerCorrection

NOISY = frozenset({"DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"})
FITTED = NOISY | {
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
}
ATTRIBUTE = "dq_sampler_correction"
PROBE = 1e-3


def check_sampler(name: str) -> None:
    """Raise `TimestepError` unless the scheduler class of this name can be corrected."""
    if name not in FITTED:
        raise TimestepError(
            f"a correction of the sampler does not fit {name}: its step does not use one output of the denoiser at the "
            f"timestep it is called with. It fits: {', '.join(sorted(FITTED))}."
        )


def correct_sampler(pipe: Any, plan: QuantPlan) -> Any:
    """Let a pipeline's scheduler correct the errors of its quantized denoiser; a plan without that changes nothing.

    Args:
        pipe: a diffusers pipeline, or anything with a ``scheduler``.
        plan: its ``sampler_correction`` is used.

    Returns:
        The pipeline.

    Raises:
        TimestepError: its scheduler is not the one that the correction was fitted for.
    """
    correction, scheduler = plan.sampler_correction, pipe.scheduler
    if correction is None:
        return pipe
    name = type(scheduler).__name__
    check_sampler(name)
    if name != correction.sampler:
        raise TimestepError(f"the sampler correction was fitted for {correction.sampler}, and the pipeline has {name}")
    scheduler.dq_sampler_correction = correction
    # bound to the instance, so that a deep copy of the scheduler steps with its own state
    scheduler.step = types.MethodType(_corrected(type(scheduler).step), scheduler)
    return pipe


def _corrected(step: Any) -> Any:
    """A scheduler's step with the correction; pipelines look at its signature."""

    @functools.wraps(step)
    def corrected(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        correction: SamplerCorrection = getattr(self, ATTRIBUTE)
        gain, noise = correction.at(float(timestep))
        channels = sample.shape[1]
        scaled = model_output[:, :channels] / (1 + gain)
        output = torch.cat([scaled, model_output[:, channels:]], 1) if model_output.shape[1] > channels else scaled
        if not noise:
            return step(self, output, timestep, sample, *args, **kwargs)
        drawn = _same_noise(output[:, :channels], kwargs)
        given = step(self, output, timestep, sample, *args, **kwargs)
        if isinstance(given, tuple):
            return (given[0] - noise * drawn.to(given[0]), *given[1:])
        given.prev_sample = given.prev_sample - noise * drawn.to(given.prev_sample)
        return given

    return corrected


def _same_noise(like: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The noise that the step will draw, drawn beforehand from copies of its generators."""
    generator = kwargs.get("generator")
    if generator is None:  # the step draws from torch's own, which a copy cannot follow on every device
        generator = torch.Generator(like.device).manual_seed(int(torch.randint(2**62, ())))
        kwargs["generator"] = generator
    copies = [_copy(each) for each in (generator if isinstance(generator, list) else [generator])]
    made = copies if isinstance(generator, list) else copies[0]
    randn_tensor: Any = _randn_tensor()
    return randn_tensor(like.shape, generator=made, device=like.device, dtype=like.dtype)


def _randn_tensor() -> Any:
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor


def _copy(generator: torch.Generator) -> torch.Generator:
    return torch.Generator(generator.device).set_state(generator.get_state())


def step_responses(config: Mapping[str, Any], timesteps: Sequence[float]) -> list[tuple[float, float]]:
    """What a scheduler's steps do, measured by calling them.

    Args:
        config: of the scheduler, with ``_class_name``.
        timesteps: of a recorded run.

    Returns:
        For every step, by how much the next sample moves for one unit of the output, and the standard deviation of the
        noise that the step adds.

    Raises:
        TimestepError: a correction does not fit it, or these are not its own timesteps.
    """
    name = str(config.get("_class_name"))
    check_sampler(name)
    if name not in NOISY or str(config.get("variance_type", "")).startswith("learned"):
        return [(0.0, 0.0)] * len(timesteps)  # nothing to leave out, or noise that the denoiser itself decides
    cls: Any = diffusers_attribute(name)
    scheduler = cls.from_config({k: v for k, v in config.items() if not k.startswith("_") and not isinstance(v, dict)})
    scheduler.set_timesteps(len(timesteps))
    own = tuple(float(t) for t in scheduler.timesteps)
    if own != tuple(timesteps):
        raise TimestepError(
            f"{name} visits {len(own)} timesteps from {own[0]:g} to {own[-1]:g} in {len(timesteps)} steps, and the "
            f"recording others, from {timesteps[0]:g} to {timesteps[-1]:g}: record with the scheduler's own"
        )
    zero, found = torch.zeros(1, 1, 64, 64), []
    drawn = torch.randn(zero.shape, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        before = copy.deepcopy(scheduler)
        base = scheduler.step(zero, t, zero, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
        moved = before.step(zero + PROBE, t, zero, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
        noise = float((base * drawn).sum() / drawn.square().sum())
        found.append((float((moved - base).mean() / PROBE), noise))
    return found
