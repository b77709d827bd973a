"""A denoiser small enough to run a whole recipe on in a second, and a calibration set recorded from it.

It has what makes diffusion hard to quantize: a temporal block, convolutions and linear layers whose inputs grow and
shrink with t, and a condition. Shapes: ``B`` samples, 4 channels, 8 x 8 pixels, conditions ``[B, 6]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from dq_plugins.calibration import CalibrationSet

TIMESTEPS = (900, 700, 500, 300, 100)
"""The schedule of `sample`."""


class TinyDenoiser(nn.Module):
    """Predicts noise from a noisy sample, a timestep and a condition; 8 quantizable layers, 2500 parameters.

    Args:
        seed: seed of the weights.
    """

    def __init__(self, seed: int = 0, width: int = 16) -> None:
        super().__init__()
        self.time_in, self.time_out = nn.Linear(width, width), nn.Linear(width, width)
        self.condition = nn.Linear(6, width)
        self.first = nn.Conv2d(4, width, 3, padding=1)
        self.modulation = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.last = nn.Conv2d(width, 4, 3, padding=1)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            spread = 1 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 0.05
            nn.init.normal_(parameter, std=spread, generator=generator)
        self.eval()

    def forward(self, sample: Tensor, timestep: Tensor | float, condition: Tensor) -> Tensor:
        """``[B, 4, 8, 8]``, a number or ``[]`` or ``[B]``, ``[B, 6]`` -> ``[B, 4, 8, 8]``."""
        t = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).reshape(-1, 1)
        frequencies = torch.exp(torch.arange(self.time_in.in_features // 2, device=sample.device) * -1.0)
        waves = torch.cat([(t * frequencies).sin(), (t * frequencies).cos()], dim=1)
        embedding = self.time_out(F.silu(self.time_in(waves)))
        scale = self.modulation(F.silu(embedding)) + self.condition(condition)
        hidden = F.silu(self.first(sample)) * (1 + t / 500 + scale)[:, :, None, None]
        tokens = hidden.flatten(2).transpose(1, 2)
        tokens = tokens + self.down(F.gelu(self.up(tokens)))
        return self.last(tokens.transpose(1, 2).reshape(hidden.shape))


def example_inputs(batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of one call of `TinyDenoiser`, at the middle timestep of `TIMESTEPS`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(TIMESTEPS[len(TIMESTEPS) // 2]),
        "condition": torch.randn(batch, 6, generator=generator),
    }


@torch.no_grad()
def sample(denoiser: nn.Module) -> Tensor:
    """Two sampling runs of five steps of a two-sample batch; gives the last samples, ``[2, 4, 8, 8]``."""
    x = torch.empty(0)
    for seed in range(2):
        inputs = example_inputs(seed=seed)
        x = inputs["sample"]
        for t in TIMESTEPS:
            x = x - 0.2 * denoiser(sample=x, timestep=torch.tensor(t), condition=inputs["condition"])
    return x


@contextmanager
def calibrated(denoiser: nn.Module | None = None) -> Iterator[tuple[nn.Module, CalibrationSet]]:
    """A denoiser and the calibration set recorded from it, which lives as long as the ``with`` block."""
    from dq_plugins.calibration import record

    denoiser = TinyDenoiser() if denoiser is None else denoiser
    with TemporaryDirectory(prefix="dq-plugins-") as folder:
        yield denoiser, record(denoiser, sample, out=Path(folder) / "calibration", progress=False)
