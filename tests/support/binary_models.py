"""A denoiser small enough to train in a test: residual blocks that take the timestep, at two resolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(embedding, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(x)) + self.time(emb)[:, :, None, None]
        return x + self.conv2(F.silu(h))


class TinyDenoiser(nn.Module):
    """``forward(sample, timestep)``: sizes 8, 4, 2, 4, 8 for an input of 8x8."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 16)
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList(Block(channels, 16) for _ in range(2))
        self.middle = Block(channels, 16)
        self.up = nn.ModuleList(Block(channels, 16) for _ in range(2))
        self.last = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        t = timestep.float().reshape(-1).expand(sample.shape[0]) / 1000
        emb = F.silu(self.embed(torch.stack([t, t.cos()], 1)))
        x, skips = self.first(sample), []
        for block in self.down:
            x = block(x, emb)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x, emb)
        for block in self.up:
            x = F.interpolate(x, scale_factor=2) + skips.pop()
            x = block(x, emb)
        return self.last(F.silu(x))


def tiny_denoiser(seed: int = 0, channels: int = 8) -> TinyDenoiser:
    torch.manual_seed(seed)
    return TinyDenoiser(channels)


def tiny_inputs(batch: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 3, 8, 8, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
    }
