"""A denoiser small enough to train in a test: residual blocks that take the timestep, at two resolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dq_plugins.graph as graph
from dq_plugins.hashing import weights_hash
from dq_plugins.passes.binarization import binarydm_choices, evolve, train_quantized
from dq_plugins.plan import LayerPlan, QuantPlan
from dq_plugins.timesteps import Schedule


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


def empty_plan(model: nn.Module) -> QuantPlan:
    """A plan that lists the layers and decides nothing."""
    part = graph.partition(model, tiny_inputs())
    layers = {n: LayerPlan(i.kind, frozenset(i.roles)) for n, i in part.layers.items()}
    return QuantPlan("TinyDenoiser", weights_hash(model), "timestep", Schedule((900.0, 500.0, 100.0)), layers=layers)


def trained(act_bits: int | None = 8, channels: int = 8) -> nn.Module:
    """As training might leave it: some scales negative, some weights at zero."""
    model = tiny_denoiser(channels=channels)
    choices = binarydm_choices(graph.partition(model, tiny_inputs()), act_bits)
    train_quantized(model, choices.layers)
    model(**tiny_inputs())
    evolve(model)
    with torch.no_grad():
        layer = model.get_submodule("middle.conv1")
        layer.weight_quantizer.scale[:3] *= -1
        layer.weight[0, 0, 0, 0] = 0.0
        layer.weight[5, 0, 0, 0] = 0.0
    return model
