"""A denoiser that upsamples by transposed convolutions, as many do outside the diffusers library."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import dq_plugins as dq
from dq_plugins.calibration import CalibrationSet

TIMESTEPS = (800.0, 400.0, 100.0)


class Transposed(nn.Module):
    """Down by a convolution, up by a grouped transposed one; ``sample [B, 4, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(4, 8, 3, padding=1)
        self.time = nn.Linear(1, 8)
        self.down = nn.Conv2d(8, 12, 2, stride=2)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2, groups=2)
        self.leave = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        time = self.time(timestep.float().reshape(-1, 1) / 1000)[:, :, None, None]
        return self.leave(torch.relu(self.up(torch.relu(self.down(self.enter(sample) + time)))))


def transposed(folder: Path) -> tuple[Transposed, CalibrationSet]:
    """The denoiser, whose input channels of ``up`` have weights of very different sizes, and calls of it."""
    torch.manual_seed(0)
    denoiser = Transposed().eval().requires_grad_(False)
    denoiser.up.weight *= torch.logspace(-1, 0, 12)[:, None, None, None]

    def sample(model: nn.Module) -> None:
        for t in TIMESTEPS:
            model(torch.randn(2, 4, 8, 8), torch.tensor(t))

    return denoiser, dq.record(denoiser, sample, folder, progress=False)
