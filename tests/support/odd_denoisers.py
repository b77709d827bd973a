"""Hand-written denoisers with names and styles that no library uses, each around one difficulty."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Wave(nn.Module):
    """Sinusoidal features of a scalar, the angles kept in a buffer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("angles", torch.exp(-torch.arange(size // 2) * math.log(1000.0) / (size // 2)))

    def forward(self, s: Tensor) -> Tensor:
        a = s[:, None].float() * self.angles
        return torch.cat([a.sin(), a.cos()], dim=1)


class Granite(nn.Module):
    """Residual block: in-place ops, FiLM from one projection that is chunked, a 1x1 shortcut behind a copy."""

    def __init__(self, cin: int, cout: int, emb: int) -> None:
        super().__init__()
        self.p = nn.Conv2d(cin, cout, 3, padding=1)
        self.film = nn.Linear(emb, 2 * cout)
        self.q = nn.Conv2d(cout, cout, 3, padding=1)
        self.r = nn.Conv2d(cin, cout, 1) if cin != cout else None

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.p(F.silu(x))
        scale, shift = self.film(F.silu(e)).reshape(len(x), -1, 1, 1).chunk(2, dim=1)
        h = h.mul_(1 + scale).add_(shift)
        h = self.q(F.silu(h, inplace=True))
        h += x if self.r is None else self.r(x.contiguous())
        return h


class Lookup(nn.Module):
    """Cross-attention written out with einsum; key and value come from one layer each."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.ask = nn.Conv2d(width, width, 1)
        self.index = nn.Linear(words, width)
        self.content = nn.Linear(words, width)
        self.back = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        q = self.ask(x).flatten(2)
        scores = torch.einsum("bcn,blc->bnl", q, self.index(words)) / math.sqrt(q.shape[1])
        y = torch.einsum("bnl,blc->bcn", scores.softmax(dim=-1), self.content(words))
        return x + self.back(y.reshape_as(x))


class Quarry(nn.Module):
    """U-Net ``forward(noisy, noise_level, words)``: none of its names says what a module is for."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.w = Wave(8)
        self.alpha = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.b = Granite(width, width, 16)
        self.c = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.d = Granite(width, 2 * width, 16)
        self.m = Lookup(2 * width, 6)
        self.u = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.f = Granite(3 * width, width, 16)
        self.z = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, noisy: Tensor, noise_level: Tensor, words: Tensor) -> Tensor:
        e = self.alpha(self.w(noise_level))
        kept = self.b(self.a(noisy), e)
        x = self.m(self.d(self.c(kept), e), words)
        x = self.u(F.interpolate(x, scale_factor=2.0))
        x = self.f(torch.cat([x, kept], dim=1), e)
        return self.z(F.silu(x))

    @staticmethod
    def inputs(batch: int = 2) -> dict[str, Any]:
        g = torch.Generator().manual_seed(0)
        return {
            "noisy": torch.randn(batch, 3, 8, 8, generator=g),
            "noise_level": torch.rand(batch, generator=g),
            "words": torch.randn(batch, 5, 6, generator=g),
        }


class Slab(nn.Module):
    """Transformer block: AdaLN from one projection cut in six, fused attention, rotary-like mixing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mod = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.one = nn.Linear(width, 2 * width)
        self.two = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        s1, b1, g1, s2, b2, g2 = self.mod(F.silu(e))[:, None].chunk(6, dim=-1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + s1) + b1
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(h).chunk(3, dim=-1))
        turn = torch.arange(q.shape[2], dtype=q.dtype, device=q.device)[:, None]
        q = q * turn.cos() + q.roll(1, -1) * turn.sin()
        x = x + g1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = F.layer_norm(x, x.shape[-1:]) * (1 + s2) + b2
        return x + g2 * self.two(F.gelu(self.one(h)))


class Obelisk(nn.Module):
    """Transformer ``forward(tokens, t, kind)`` with class labels, a projected position table and a free parameter."""

    def __init__(self, width: int = 16, tokens: int = 4) -> None:
        super().__init__()
        self.w = Wave(width)
        self.when = nn.Linear(width, width)
        self.what = nn.Embedding(5, width)
        self.enter = nn.Linear(3, width)
        self.place = nn.Linear(2, width)
        self.table = nn.Parameter(torch.randn(2, width))
        self.register_buffer("grid", torch.rand(tokens, 2))
        self.slabs = nn.ModuleList(Slab(width) for _ in range(2))
        self.leave = nn.Linear(width, 3)

    def forward(self, tokens: Tensor, t: Tensor, kind: Tensor) -> dict[str, Tensor]:
        e = self.when(self.w(t))
        x = self.enter(tokens) + self.place(self.grid)
        for slab in self.slabs:
            x = slab(x, e + self.what(kind))
        shift, scale = (self.table[None] + e[:, None]).unbind(1)
        return {"denoised": self.leave(x * (1 + scale[:, None]) + shift[:, None])}

    @staticmethod
    def inputs(batch: int = 2) -> dict[str, Any]:
        g = torch.Generator().manual_seed(0)
        return {
            "tokens": torch.randn(batch, 4, 3, generator=g),
            "t": torch.rand(batch, generator=g),
            "kind": torch.tensor([1, 3])[:batch],
        }


class TwoLayers(nn.Module):
    """Base of the smallest denoisers: one layer on the timestep, one on the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(4, 4)
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.body(x) + self.time(t)

    @staticmethod
    def inputs() -> dict[str, Any]:
        return {"x": torch.randn(2, 4), "t": torch.rand(2, 4)}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values, zero-initialised ones too."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    return model
