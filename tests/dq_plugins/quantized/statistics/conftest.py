"""A denoiser whose layers see inputs that move over time and inputs that do not, and calls recorded from it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dq_plugins.calibration import record

TIMESTEPS = (900, 700, 500, 300, 100)


class Denoiser(nn.Module):
    """``moves`` sees inputs that grow with the timestep, ``still`` inputs that do not, ``unused`` none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.moves = nn.Conv2d(3, 3, 3, padding=1)
        self.still = nn.Linear(5, 3)
        self.unused = nn.Linear(2, 2)
        self.calls = 0

    def forward(self, x, t, cond):
        self.calls += 1
        scale = (torch.as_tensor(t, dtype=torch.float32) / 100).reshape(-1, 1, 1, 1)
        return self.moves(input=x * scale) + self.still(cond)[:, :, None, None]


@pytest.fixture
def denoiser():
    return Denoiser()


@pytest.fixture
def calib(tmp_path, denoiser):
    def sample(d):
        generator = torch.Generator().manual_seed(0)
        cond = torch.randn(2, 5, generator=generator)
        for _ in range(2):
            for t in TIMESTEPS:
                d(torch.randn(2, 3, 8, 8, generator=generator), t, cond)

    return record(denoiser, sample, tmp_path / "calib", progress=False)
