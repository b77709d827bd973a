"""A diffusers scheduler as a `dq_plugins.passes.steps.Stepper`: any timesteps, from a config alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dq_diffusers.host import diffusers_attribute
from dq_diffusers.recording import NON_FINITE
from dq_diffusers.schedules import planned_scheduler
from dq_plugins.errors import TimestepError

SEED = 0
"""Of the noise that a stochastic scheduler adds; the same for every schedule, so that schedules can be compared."""


class DiffusersStepper:
    """What a scheduler does between two denoiser calls.

    Args:
        config: the scheduler's config, with ``_class_name``.
        guidance: weight of classifier-free guidance, or None.

    Raises:
        TimestepError: diffusers has no such scheduler, or it takes no custom timesteps.
    """

    def __init__(self, config: Mapping[str, Any], guidance: float | None = None) -> None:
        name = str(config.get("_class_name"))
        cls = diffusers_attribute(name) if name.isidentifier() else None
        if cls is None:
            raise TimestepError(f"diffusers has no scheduler {name!r}, which this recording was made with")
        self.scheduler = cls.from_config({k: _number(v) for k, v in config.items() if not k.startswith("_")})
        self.guidance = guidance
        # refuses by name what takes no timesteps; every scheduler that does has 2 and 1
        planned_scheduler(self.scheduler, (2.0, 1.0))

    @property
    def stochastic(self) -> bool:
        """Whether a step adds noise: two runs of different timesteps then differ by more than their error."""
        config = self.scheduler.config
        sde = str(config.get("algorithm_type", "")).startswith("sde")
        return type(self.scheduler).__name__ == "DDPMScheduler" or sde or bool(config.get("stochastic_sampling"))

    @property
    def end(self) -> float:
        """Below every timestep: the last step goes to the clean sample."""
        return -1.0

    def own(self, steps: int) -> tuple[float, ...]:
        """The scheduler's own timesteps for so many steps, without repetitions."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps)
        return tuple(dict.fromkeys(float(t) for t in scheduler.timesteps))

    def begin(self, timesteps: Sequence[float]) -> DiffusersRun:
        """A run over ``timesteps``, descending; raises `TimestepError` for timesteps that it cannot visit."""
        return DiffusersRun(planned_scheduler(self.scheduler, timesteps), timesteps)


class DiffusersRun:
    """One sampling run; made by `DiffusersStepper.begin`. Steps are taken in order."""

    def __init__(self, scheduler: Any, timesteps: Sequence[float]) -> None:
        self.scheduler = scheduler
        scheduler.set_timesteps(len(timesteps))
        self.timesteps = scheduler.timesteps
        takes = inspect.signature(scheduler.step).parameters
        self._noise = {"generator": torch.Generator().manual_seed(SEED)} if "generator" in takes else {}

    @property
    def spread(self) -> float:
        """Standard deviation of the sample that a run starts from."""
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def scale(self, step: int, sample: Tensor) -> Tensor:
        """What the denoiser is given for ``sample`` at a step."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        return sample if scale is None else scale(sample, self.timesteps[step])

    def step(self, step: int, output: Tensor, sample: Tensor) -> Tensor:
        """The next sample; after the last step the final one."""
        return self.scheduler.step(output, self.timesteps[step], sample, return_dict=False, **self._noise)[0]


def _number(value: Any) -> Any:
    return float(value[NON_FINITE]) if isinstance(value, dict) and NON_FINITE in value else value
