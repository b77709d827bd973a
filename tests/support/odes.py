"""Recordings of small samplers that are known in closed form."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import dq_plugins as dq

TIMESTEPS = tuple(float(t) for t in range(950, 0, -100))


class Velocity(nn.Module):
    """A smooth flow with layers to quantize; bends most at small t."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(2, width, 3, padding=1), nn.Conv2d(width, 2, 3, padding=1)
        self.time = nn.Linear(2, width)

    def forward(self, sample: Tensor, timestep: Tensor, scale: Tensor | None = None) -> Tensor:
        t = timestep.float().reshape(-1, 1) / 1000
        hidden = self.first(sample) + self.time(torch.cat([t, (t + 0.05).log()], 1))[:, :, None, None]
        hidden = hidden if scale is None else hidden * scale[:, None, None, None]
        return self.last(torch.tanh(hidden))


def velocity() -> Velocity:
    return Velocity().eval().requires_grad_(False)


def alpha_sigma(t: float) -> tuple[float, float]:
    """A variance-preserving schedule."""
    angle = torch.tensor(t / 1000 * 1.5)
    return float(angle.cos()), float(angle.sin())


def flow_step(x: Tensor, y: Tensor, t: float, following: float) -> Tensor:
    return x + (t - following) / 1000 * y


def noise_step(x: Tensor, y: Tensor, t: float, following: float) -> Tensor:
    (a, s), (b, r) = alpha_sigma(t), alpha_sigma(following)
    return b * (x - s * y) / a + r * y


def velocity_step(x: Tensor, y: Tensor, t: float, following: float) -> Tensor:
    (a, s), (b, r) = alpha_sigma(t), alpha_sigma(following)
    clean, noise = a * x - s * y, s * x + a * y
    return b * clean + r * noise


STEPS = {"flow": flow_step, "noise": noise_step, "velocity": velocity_step}


def run(
    denoiser: nn.Module, kind: str, timesteps: tuple[float, ...], last: float, seed: int = 0, guided: bool = False
) -> Tensor:
    """Sample over ``timesteps``; the last step goes to ``last``."""
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    strength = torch.tensor([0.5] * 3 + [1.0] * 3)
    for t, following in zip(timesteps, [*timesteps[1:], last], strict=True):
        if guided:
            null, y = denoiser(sample=torch.cat([x, x]), timestep=torch.tensor([t] * 6), scale=strength).chunk(2)
            y = null + 3.0 * (y - null)
        else:
            y = denoiser(sample=x, timestep=torch.tensor([t]))
        if following != t:
            x = STEPS[kind](x, y, t, following)
    return x


def recorded(denoiser: nn.Module, kind: str, folder: Path, guided: bool = False, runs: int = 2) -> dq.CalibrationSet:
    def sample(d: nn.Module) -> None:
        for seed in range(runs):
            run(d, kind, TIMESTEPS, TIMESTEPS[-1], seed, guided)

    return dq.record(denoiser, sample, out=folder, progress=False)
