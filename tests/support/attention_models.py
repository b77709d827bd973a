"""A tiny denoiser whose blocks attend to themselves and to a text, in heads, and plans for it."""

from __future__ import annotations

from pathlib import Path

import torch
from denoisers import sinusoid
from torch import Tensor, nn
from torch.nn import functional as F

import dq_plugins as dq
from dq_plugins.recipe import Recipe, Step

HEADS, TOKENS = 2, 7
SCHEDULE = (900.0, 500.0, 100.0)
ALONE = Recipe(
    "attention alone", "", (Step("timestep-groups", {"method": "uniform", "groups": 3}), Step("attention-ranges"))
)
RECIPE = Recipe(
    "attention", "", (Step("weight-ranges"), ALONE.steps[0], Step("activation-ranges"), Step("attention-ranges"))
)


class SelfOrCross(nn.Module):
    """One attention in heads, of an image's tokens to themselves or to a text."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(width, width), nn.Linear(features, width), nn.Linear(features, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, seen: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f, y in ((self.a, x), (self.b, seen), (self.c, seen))
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class AttentionDenoiser(nn.Module):
    """``sample [B, 2, 6, 6]``, ``timestep``, ``text [B, TOKENS, 10]``, of which tokens may be masked."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(2, width, 3, padding=1), nn.Conv2d(width, 2, 3, padding=1)
        self.time = nn.Linear(8, width)
        self.near, self.far = SelfOrCross(width, width), SelfOrCross(width, 10)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        t = sinusoid(timestep, 8).to(sample.dtype)
        x = self.enter(sample * (1 + t[:, :1, None, None].abs())) + self.time(t)[:, :, None, None]
        rows = x.flatten(2).transpose(1, 2)
        rows = rows + self.near(rows, rows)
        rows = rows + self.far(rows, text, None if mask is None else mask[:, None, None])
        return self.leave(rows.transpose(1, 2).reshape_as(x))


def attention_denoiser(seed: int = 0) -> AttentionDenoiser:
    torch.manual_seed(seed)
    return AttentionDenoiser().eval().requires_grad_(False)


def loud_keys_denoiser(module: str = "near", loud: float = 30.0) -> AttentionDenoiser:
    """One whose attention ``module`` is hard to quantize, and no layer is: one channel of its keys is ``loud`` times as
    large as the others, and the queries' as much smaller, so that in floating point both attentions are alike."""
    denoiser = attention_denoiser()
    attention = denoiser.get_submodule(module)
    for each in (denoiser.near, denoiser.far):
        each.a.weight.mul_(3)  # or they would attend to everything alike
    for layer, factor in ((attention.a, 1 / loud), (attention.b, loud)):
        layer.weight[0] *= factor
        layer.bias[0] *= factor
    return denoiser


def attention_inputs(t: float | Tensor = 500.0, batch: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 2, 6, 6, generator=generator),
        "timestep": torch.as_tensor(t).expand(batch).clone(),
        "text": torch.randn(batch, TOKENS, 10, generator=generator),
    }


def attention_calls_recorded(denoiser: nn.Module, folder: Path) -> dq.CalibrationSet:
    def sample(d: nn.Module) -> None:
        inputs = attention_inputs()
        for t in SCHEDULE:
            inputs["sample"] = 0.6 * inputs["sample"] + 0.3 * d(**{**inputs, "timestep": torch.full((3,), t)})

    return dq.record(denoiser, sample, out=folder, progress=False)


def attention_plan(denoiser: nn.Module, folder: Path, recipe: Recipe = RECIPE) -> dq.QuantPlan:
    return dq.make_plan(denoiser, attention_calls_recorded(denoiser, folder), recipe, progress=False)
