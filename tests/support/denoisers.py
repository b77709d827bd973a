"""Small denoisers for tests: hand-written, with names that give nothing away."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dq_plugins as dq

SCHEDULE = (901.0, 701.0, 501.0, 301.0, 101.0)


def sinusoid(t: Tensor, width: int) -> Tensor:
    half = width // 2
    frequencies = torch.exp(-math.log(1e4) * torch.arange(half, device=t.device) / half)
    angles = t.float().reshape(-1, 1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Residual(nn.Module):
    """A convolution block modulated by an embedding of t."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.alpha = nn.Conv2d(width, width, 3, padding=1)
        self.beta = nn.Linear(embedding, width)
        self.gamma = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = F.silu(self.alpha(x)) * (1 + self.beta(F.silu(e))[:, :, None, None])
        return x + self.gamma(F.silu(h))


class TinyDenoiser(nn.Module):
    """U-shaped enough: an embedding of t, two modulated residual blocks, a first and a last convolution."""

    def __init__(self, width: int = 8, embedding: int = 16) -> None:
        super().__init__()
        self.embedding = embedding
        self.p = nn.Linear(embedding, embedding)
        self.q = nn.Linear(embedding, embedding)
        self.enter = nn.Conv2d(2, width, 3, padding=1)
        self.body = nn.ModuleList(Residual(width, embedding) for _ in range(2))
        self.leave = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        e = self.q(F.silu(self.p(sinusoid(timestep, self.embedding))))
        x = self.enter(sample)
        for block in self.body:
            x = block(x, e)
        return self.leave(x) * (0.2 + timestep.float().reshape(-1, 1, 1, 1) / 1000)


def tiny_denoiser(seed: int = 0) -> TinyDenoiser:
    torch.manual_seed(seed)
    return TinyDenoiser().eval().requires_grad_(False)


def loud_where_it_does_not_matter(seed: int = 0, factor: float = 8.0) -> TinyDenoiser:
    """Half of what two of its layers see is loud and meets weights of 0: only the quiet half counts."""
    denoiser = tiny_denoiser(seed)
    with torch.no_grad():
        for block in denoiser.body:
            for parameter in block.alpha.parameters():
                parameter[:4] *= factor
            block.gamma.weight[:, :4] = 0
    return denoiser


def example(denoiser: nn.Module | None = None) -> dict[str, Tensor]:
    return {"sample": torch.zeros(2, 2, 8, 8), "timestep": torch.tensor([5.0, 5.0])}


def sampler(batch: int = 2, seed: int = 0, schedule: tuple[float, ...] = SCHEDULE):
    """A sampler whose sample shrinks from step to step, so that activation ranges move with t."""

    def sample(denoiser: nn.Module) -> Tensor:
        x = 8 * torch.randn(batch, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
        for t in schedule:
            x = 0.5 * x + 0.3 * denoiser(sample=x, timestep=torch.full((batch,), t))
        return x

    return sample


def recorded(denoiser: nn.Module, folder: Path, **options) -> dq.CalibrationSet:
    return dq.record(denoiser, sampler(**options), out=folder, progress=False)


class ClassDenoiser(TinyDenoiser):
    """The tiny denoiser with a class added to the embedding of t, as in DiT: the modulation mixes both."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.table = nn.Embedding(classes, self.embedding)

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        e = self.q(F.silu(self.p(sinusoid(timestep, self.embedding)))) + self.table(label)
        x = self.enter(sample)
        for block in self.body:
            x = block(x, e)
        return self.leave(x)


def class_denoiser(seed: int = 0) -> ClassDenoiser:
    torch.manual_seed(seed)
    return ClassDenoiser().eval().requires_grad_(False)


def recorded_classes(denoiser: nn.Module, folder: Path, labels: tuple[int, ...] = (0, 2, 0, 1)) -> dq.CalibrationSet:
    """Batches of two with these labels, over the schedule."""

    def sample(model: nn.Module) -> None:
        for first in range(0, len(labels), 2):
            x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(first))
            for t in SCHEDULE:
                x = 0.5 * x + 0.3 * model(
                    sample=x, timestep=torch.full((2,), t), label=torch.tensor(labels[first : first + 2])
                )

    return dq.record(denoiser, sample, out=folder, progress=False)
