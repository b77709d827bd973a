"""A tiny denoiser with cross-attention, and text embeddings with a planted outlier token."""

from __future__ import annotations

from pathlib import Path

import torch
from denoisers import sinusoid
from torch import Tensor, nn
from torch.nn import functional as F

import dq_plugins as dq

TOKENS, FEATURES = 6, 12


class Attending(nn.Module):
    """An image of tokens that looks at a text."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.enter = nn.Conv2d(2, width, 3, padding=1)
        self.time = nn.Linear(8, width)
        self.u, self.v, self.w = nn.Linear(width, width), nn.Linear(FEATURES, width), nn.Linear(FEATURES, width)
        self.leave = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = self.enter(sample) + self.time(sinusoid(timestep, 8))[:, :, None, None]
        rows = x.flatten(2).transpose(1, 2)
        looked = F.scaled_dot_product_attention(self.u(rows), self.v(text), self.w(text))
        return self.leave(F.silu(x + looked.transpose(1, 2).reshape_as(x)))


def attending(seed: int = 0) -> Attending:
    torch.manual_seed(seed)
    denoiser = Attending().eval().requires_grad_(False)
    with torch.no_grad():  # the outlier must not decide every softmax
        denoiser.v.weight[:, 3] *= 0.01
    return denoiser


def texts(count: int, factor: float = 80.0, seed: int = 0) -> Tensor:
    """Embeddings ``[count, TOKENS, FEATURES]`` whose token 0 is the same everywhere, with one huge value."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(count, TOKENS, FEATURES, generator=generator)
    text[:, 0] = torch.randn(FEATURES, generator=torch.Generator().manual_seed(99))
    text[:, 0, 3] = factor * 2.5
    return text


def recorded_texts(denoiser: nn.Module, folder: Path, factor: float = 80.0) -> dq.CalibrationSet:
    def sample(d: nn.Module) -> None:
        x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        for t in (900.0, 500.0, 100.0):
            x = 0.6 * x + 0.3 * d(sample=x, timestep=torch.full((3,), t), text=texts(3, factor))

    return dq.record(denoiser, sample, out=folder, progress=False)
