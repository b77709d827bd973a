"""A denoiser whose inner layer sees the samples of a batch in a given order, at a loudness that grows with time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dq_plugins as dq

TOKENS, CHANNELS = 4, 8
TIMESTEPS = (900.0, 500.0, 100.0)


class Layout(nn.Module):
    """``middle`` sees ``[B, S, C]``, ``[B S, C]``, ``[S B, C]``, ``[S, B, C]``, or ``[S / 2, 2, B, C]``."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layout = layout
        self.enter, self.middle, self.leave = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        t = timestep if timestep.dim() == 2 else timestep.reshape(-1).expand(len(sample))[:, None]
        loud = 1 + t[..., None] / 10  # [B, S, 1], or [B, 1, 1]
        x = self.enter(sample) * loud
        batch, tokens, channels = x.shape
        if self.layout == "B S C":
            y = self.middle(x)
        elif self.layout == "(B S) C":
            y = self.middle(x.reshape(-1, channels)).reshape(x.shape)
        elif self.layout == "(S B) C":
            y = self.middle(x.transpose(0, 1).reshape(-1, channels)).reshape(tokens, batch, channels).transpose(0, 1)
        elif self.layout == "S B C":
            y = self.middle(x.transpose(0, 1)).transpose(0, 1)
        else:
            parts = x.transpose(0, 1).reshape(tokens // 2, 2, batch, channels)
            y = self.middle(parts).reshape(tokens, batch, channels).transpose(0, 1)
        return sample + self.leave(y / loud)


ORDERS = {"B S C": "first", "(B S) C": "first", "(S B) C": "fastest", "S B C": "second", "S/2 2 B C": "mixed"}


def noise(batch: int, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    """A batch of samples."""
    return torch.randn(batch, tokens, CHANNELS, generator=torch.Generator().manual_seed(seed))


def token_timesteps(batch: int, tokens: int, *, same: bool = False) -> Tensor:
    """One of `TIMESTEPS` for every token: ``[B, S]``; samples begin with another one, or all with the ``same``."""
    place = torch.arange(batch)[:, None] * (not same) + torch.arange(tokens)
    return torch.tensor(TIMESTEPS)[place % len(TIMESTEPS)]


def planned(model: Layout, folder, recipe: str = "ranges") -> dq.QuantPlan:
    """A plan with a group for each of `TIMESTEPS`, recorded with one timestep a call."""

    def sample(denoiser: nn.Module) -> None:
        for t in TIMESTEPS:
            denoiser(noise(2), torch.tensor(t))

    calibration = dq.record(model, sample, folder, progress=False)
    options = {"timestep-groups": {"groups": len(TIMESTEPS)}}
    return dq.make_plan(model, calibration, recipe, options=options, progress=False)
