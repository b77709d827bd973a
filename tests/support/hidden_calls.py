"""Denoisers whose layers a quantizer cannot see: weights used by another module, computed, or handed to a kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dq_plugins as dq

WIDTH = 16


class Sequence(nn.Module):
    """``[B, 6, 4]`` in and out, with ``middle`` between an embedding of t and the last layer."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.time, self.enter, self.leave = nn.Linear(1, WIDTH), nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.middle = middle

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = self.enter(sample) + self.time(timestep.reshape(-1, 1, 1) / 1000)
        return self.leave(h + self.middle(h))


class Attention(nn.Module):
    """PyTorch's own, which computes with ``out_proj`` and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        return self.inner(h, h, h, need_weights=False)[0]


class Functional(nn.Module):
    """Uses the weight of a layer, as poolers that call ``F.multi_head_attention_forward`` do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.inner.weight, self.inner.bias)


class TwoNames(nn.Module):
    """One layer under two names, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.tied = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.alias = self.inner
        self.tied.weight = self.inner.weight

    def forward(self, h: Tensor) -> Tensor:
        return self.tied(torch.relu(self.alias(torch.relu(self.inner(h)))))


def weight_norm() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True), 1)


def sequence_denoiser(middle: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return Sequence(middle()).eval().requires_grad_(False)


def recorded_sequence(denoiser: nn.Module, folder: Path) -> dq.CalibrationSet:
    def sample(model: nn.Module) -> None:
        x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
        for t in (900.0, 500.0, 100.0):
            x = 0.5 * x + 0.3 * model(sample=x, timestep=torch.full((2,), t))

    return dq.record(denoiser, sample, folder, progress=False)
