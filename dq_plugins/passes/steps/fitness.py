"""How good a candidate is: its images against those of full precision over many steps, from the same noise.

Any registered metric scores the images (``mse``: the trajectory error; ``ssim``; ``frechet``), as they are or as a
network of the user's sees them. Rungs are numbers of images: on the first few, bad candidates die early.

Shapes: images ``[B, C, H, W]``; features ``[B, ...]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name

import torch
from torch import Tensor, nn

from dq_plugins import registry
from dq_plugins.calibration import first_tensor
from dq_plugins.errors import DQError, RecipeError
from dq_plugins.passes.steps.runs import Run
from dq_plugins.passes.steps.space import Candidate, Space
from dq_plugins.passes.steps.stepper import Stepper
from dq_plugins.quantized.candidates import Candidates
from dq_plugins.quantized.network import SuperNetwork
from dq_plugins.quantized.width import Width
from dq_plugins.sensitivity.measure import Sums

DIVERGED = 1e30
"""Loss of a candidate whose images are not finite."""


def load_features(name: str) -> Callable[[Tensor], Tensor]:
    """The feature network that a user names ``package.module:attribute``: images ``[B, C, H, W]`` to ``[B, ...]``.

    Raises:
        RecipeError: there is none, or it cannot be called.
    """
    try:
        found = resolve_name(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise RecipeError(
            f"there is no feature network {name!r}: {error}; it is named package.module:attribute"
        ) from error
    if not callable(found):
        raise RecipeError(f"{name!r} is a {type(found).__name__}; a feature network takes images and gives features")
    return found


@dataclass(frozen=True, eq=False)
class SamplingFitness:
    """Samples a candidate in the super-network and compares the images. Picklable.

    Attributes:
        denoiser: full precision.
        candidates: the quantizers.
        timestep: name of the denoiser's timestep argument.
        space: what candidates are positions in.
        runs: recorded runs, each with its noise and its full-precision result.
        stepper: the sampler.
        images: how many images each rung looks at, ascending; at most all.
        metric: registered metric.
        features: name of a feature network, see `load_features`; None compares images.
    """

    denoiser: nn.Module
    candidates: Candidates
    timestep: str
    space: Space
    runs: Sequence[Run]
    stepper: Stepper
    images: tuple[int, ...]
    metric: str = "mse"
    features: str | None = None

    def __post_init__(self) -> None:
        if self.stepper.stochastic and self.metric != "frechet":
            raise RecipeError(
                f"this sampler adds noise at every step, so images of different timesteps differ by chance and "
                f"{self.metric!r} would measure that; use the metric 'frechet', or record with a deterministic sampler "
                "such as DDIM"
            )

    @property
    def rungs(self) -> int:
        """Numbers of images."""
        return len(self.images)

    def __call__(self, candidate: Candidate, rung: int) -> Sums:
        """Loss of a candidate, and its cost in denoiser calls of one image."""
        images = self.images[rung]
        final = self.final(self.space.timesteps(candidate), self.space.widths(candidate), images)
        return {"loss": self.loss(final), "calls": float(len(candidate.steps) * images)}

    def final(self, timesteps: Sequence[float], widths: dict[str, Width], images: int | None = None) -> Tensor:
        """Images of any schedule and widths, the first so many (all by default)."""
        wanted = sum(run.images for run in self.runs) if images is None else images
        finals = []
        with SuperNetwork(self.denoiser, self.candidates, self.timestep) as network, torch.no_grad():
            network.switch(widths)
            for run in self.runs:
                if wanted <= 0:
                    break
                part = run.first(min(wanted, run.images))
                finals.append(
                    part.sample(self.stepper, timesteps, lambda kwargs: first_tensor(self.denoiser(**kwargs)))
                )
                wanted -= part.images
        return torch.cat(finals)

    def loss(self, final: Tensor) -> float:
        """Distance of images to the full-precision ones from the same noise; lower is better."""
        if not bool(torch.isfinite(final).all()):
            return DIVERGED
        reference = torch.cat([run.final for run in self.runs])[: len(final)]
        if self.features is not None:
            network = load_features(self.features)
            with torch.no_grad():
                reference, final = network(reference), network(final)
        metric = registry.function("metric", self.metric)
        value = metric(reference, final)
        value = -value if metric.higher_is_better else value
        if value != value:
            raise DQError(f"metric {self.metric!r} is not a number for these images, so it cannot rank candidates")
        return max(min(value, DIVERGED), -DIVERGED)
