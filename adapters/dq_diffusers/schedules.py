"""Diffusers schedulers that visit the timesteps of a plan, whatever number of steps a pipeline asks for.

Each class here is a diffusers scheduler of the same name with two changes: ``set_timesteps`` gives the planned
timesteps, and the config holds them, so that a saved pipeline finds them again (its index names this module).

How each family takes timesteps of the user's own:

| scheduler | way |
|---|---|
| DDPM, DPM-Solver multistep, Euler | the ``timesteps`` argument of ``set_timesteps`` |
| DDIM | none: its step reads the distance to the next timestep off the number of steps, so that is set for each step |
| flow matching Euler | a timestep is ``1000 sigma`` after all shifting, so timesteps and sigmas are set together |

Other schedulers are refused by name: their steps assume a spacing, or their noise levels do not follow from timesteps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch

from dq_diffusers.host import diffusers_attribute
from dq_plugins.errors import TimestepError, require

require("diffusers", "diffusers", "sample with planned timesteps")
diffusers_attribute("DiffusionPipeline")  # the first import, which this makes a quiet one

import diffusers  # noqa: E402
from diffusers import SchedulerMixin  # noqa: E402, F401  # pipelines that are loaded look for it beside the class

FIELD = "planned_timesteps"
"""Field of a scheduler's config that holds the timesteps."""


class Planned:
    """Mixin in front of a diffusers scheduler: ``set_timesteps`` gives the planned timesteps.

    Attributes:
        planned: the timesteps, in the order of sampling.
    """

    planned: tuple[float, ...]

    @classmethod
    def from_config(cls, config: Any = None, **kwargs: Any) -> Any:
        """A scheduler from a config that holds ``planned_timesteps``, or with them as an argument."""
        given = kwargs.pop(FIELD, None) or dict(config or {}).get(FIELD)
        if not given:
            raise TimestepError(f"a planned {cls.__name__} needs {FIELD} in its config, and there is none")
        rest = {key: value for key, value in dict(config).items() if key != FIELD}
        made = super().from_config(rest, **kwargs)  # type: ignore[misc]  # of the diffusers class behind
        scheduler = made[0] if isinstance(made, tuple) else made
        scheduler.planned = tuple(float(t) for t in given)
        scheduler.register_to_config(**{FIELD: [float(t) for t in given]})
        return made

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Set the planned timesteps; the other arguments are what pipelines pass, and do not count."""
        self._visit_planned(device)

    def _visit_planned(self, device: Any) -> None:
        super().set_timesteps(device=device, timesteps=list(self.planned))  # type: ignore[misc]


def _integers(planned: Sequence[float]) -> list[int]:
    return [int(t) for t in planned]


class DDPMScheduler(Planned, diffusers.DDPMScheduler):
    """DDPM over the planned timesteps."""

    def _visit_planned(self, device: Any) -> None:
        # DDPM indexes its tables with them, so they are integers
        diffusers.DDPMScheduler.set_timesteps(self, device=device, timesteps=_integers(self.planned))


class DPMSolverMultistepScheduler(Planned, diffusers.DPMSolverMultistepScheduler):
    """DPM-Solver and DPM-Solver++ over the planned timesteps."""


class EulerDiscreteScheduler(Planned, diffusers.EulerDiscreteScheduler):
    """Euler over the planned timesteps."""


class DDIMScheduler(Planned, diffusers.DDIMScheduler):
    """DDIM over the planned timesteps."""

    def _visit_planned(self, device: Any) -> None:
        self.num_inference_steps = len(self.planned)
        self.timesteps = torch.tensor(_integers(self.planned), device=device)

    # pipelines look at the signature for eta and generator
    @functools.wraps(diffusers.DDIMScheduler.step)
    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        """One DDIM step to the next planned timestep."""
        following = dict(pairwise([*_integers(self.planned), -1]))[int(timestep)]
        # DDIM goes to t - num_train_timesteps // num_inference_steps: the fraction makes that the next timestep
        self.num_inference_steps = Fraction(self.config.num_train_timesteps, int(timestep) - following)
        try:
            return super().step(model_output, timestep, sample, *args, **kwargs)
        finally:
            self.num_inference_steps = len(self.planned)


class FlowMatchEulerDiscreteScheduler(Planned, diffusers.FlowMatchEulerDiscreteScheduler):
    """Flow matching Euler over the planned timesteps, which are ``1000 sigma`` after shifting."""

    def _visit_planned(self, device: Any) -> None:
        planned = torch.tensor(self.planned, dtype=torch.float32, device=device)
        self.num_inference_steps = len(self.planned)
        self.timesteps = planned
        self.sigmas = torch.cat([planned / self.config.num_train_timesteps, planned.new_zeros(1)])
        self._step_index = self._begin_index = None


SCHEDULERS: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
    )
}
"""Schedulers that take planned timesteps, by the name they have in diffusers too."""


def planned_scheduler(scheduler: Any, timesteps: Sequence[float]) -> Any:
    """A scheduler like ``scheduler`` that visits ``timesteps``.

    Args:
        scheduler: a diffusers scheduler of a class in `SCHEDULERS`; it is left as it is.
        timesteps: descending.

    Returns:
        A scheduler whose ``set_timesteps`` gives them for any number of steps.

    Raises:
        TimestepError: the class or its settings do not take custom timesteps, or these are not timesteps of it.
    """
    name = type(scheduler).__name__
    if name not in SCHEDULERS:
        raise TimestepError(
            f"{name} takes no custom timesteps, so a plan that chose timesteps cannot sample with it; these do: "
            f"{', '.join(sorted(SCHEDULERS))}. Use one of them: NewScheduler.from_config(pipe.scheduler.config)."
        )
    _check(name, scheduler.config, timesteps)
    planned = SCHEDULERS[name].from_config(scheduler.config, **{FIELD: list(timesteps)})
    try:
        planned.set_timesteps(len(timesteps))
    except ValueError as error:
        raise TimestepError(f"{name} with these settings takes no custom timesteps: {error}") from error
    return planned


def _check(name: str, config: Any, timesteps: Sequence[float]) -> None:
    """Refuse settings under which diffusers ignores given timesteps without a word, and impossible timesteps."""
    ignored = {"interpolation_type": "log_linear", "invert_sigmas": True, "use_flow_sigmas": True}
    bad = [f"{key}={value!r}" for key, value in ignored.items() if config.get(key) == value]
    if bad:
        raise TimestepError(f"{name} with {bad[0]} takes no custom timesteps; set another value in its config")
    last = config.get("num_train_timesteps", 1000)
    flow = name.startswith("FlowMatch")
    fits = all(0 <= t < last or (flow and 0 < t <= last) for t in timesteps)
    whole = flow or name.startswith("Euler") or all(float(t).is_integer() for t in timesteps)
    if not timesteps or any(a <= b for a, b in pairwise(timesteps)) or not fits or not whole:
        kind = "numbers" if flow or name.startswith("Euler") else "whole numbers"
        raise TimestepError(
            f"{name} visits descending {kind} from {last if flow else last - 1} down to 0; got "
            f"{', '.join(f'{t:g}' for t in timesteps) or 'none'}"
        )


def install_schedule(pipe: Any, plan: Any) -> Any:
    """Let a pipeline sample with the timesteps that a plan chose; a plan that chose none changes nothing.

    Args:
        pipe: a diffusers pipeline; its ``scheduler`` is replaced.
        plan: a `dq_plugins.QuantPlan`.

    Returns:
        The pipeline.

    Raises:
        TimestepError: its scheduler does not take custom timesteps.
    """
    if plan.sampling is not None:
        pipe.scheduler = planned_scheduler(pipe.scheduler, plan.sampling.timesteps)
    return pipe
