"""Transformers, recurrent and other denoisers as people write them without diffusers, and unusual ways to be called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo.foreign_unets import waves


class DiTBlock(nn.Module):
    """Attention and MLP between modulations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        s1, k1, g1, s2, k2, g2 = self.adaLN_modulation(c).reshape(len(c), -1, 6 * x.shape[-1]).chunk(6, -1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + k1) + s1
        q, k, v = self.qkv(h).reshape(*h.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
        x = x + g1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + g2 * self.mlp(F.layer_norm(x, x.shape[-1:]) * (1 + k2) + s2)


class DiT(nn.Module):
    """DiT: ``forward(x, t, y)``, a table of positions as a parameter."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(4, width, 2, 2)
        self.t_embedder = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Embedding(5, width)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, width), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(width) for _ in range(2))
        self.linear = nn.Linear(width, 16)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(waves(t, 8)) + self.y_embedder(y)
        for block in self.blocks:
            h = block(h, c)
        return F.pixel_shuffle(self.linear(h).transpose(1, 2).unflatten(2, (4, 4)), 2)


class TokenTimes(DiT):
    """Diffusion forcing: one timestep per token ``[B, N]``."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        del self.x_embedder, self.y_embedder, self.pos_embed, self.linear
        self.enter, self.leave = nn.Linear(6, width), nn.Linear(width, 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        h, c = self.enter(x), self.t_embedder(waves(t, 8)).unflatten(0, t.shape)
        for block in self.blocks:
            h = block(h, c)
        return self.leave(h)


class UViT(nn.Module):
    """U-ViT: timestep and text are tokens beside those of the image, long skips."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patch_embed, self.context_embed = nn.Conv2d(4, width, 2, 2), nn.Linear(6, width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.skip_linear, self.decoder_pred = nn.Linear(2 * width, width), nn.Linear(width, 16)
        self.final_layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        h = torch.cat((waves(timesteps, 16)[:, None], self.context_embed(context), patches), 1)
        q, k, v = self.qkv(h).chunk(3, -1)
        h = self.skip_linear(torch.cat([h + self.proj(F.scaled_dot_product_attention(q, k, v)), h], -1))
        h = self.decoder_pred(h[:, -patches.shape[1] :]).transpose(1, 2).unflatten(2, (4, 4))
        return self.final_layer(F.pixel_shuffle(h, 2))


class Motion(nn.Module):
    """MDM: PyTorch's own encoder, sequence first, conditions in a dictionary."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.input_process, self.output_process = nn.Linear(6, width), nn.Linear(width, 6)
        self.embed_timestep, self.embed_text = nn.Linear(width, width), nn.Linear(5, width)
        layer = nn.TransformerEncoderLayer(width, 2, 32, activation="gelu")
        self.seqTransEncoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, timesteps: Tensor, y: dict[str, Tensor]) -> Tensor:
        emb = (self.embed_timestep(waves(timesteps, 16)) + self.embed_text(y["text"]))[None]  # [1, B, C]
        h = self.input_process(x.permute(2, 0, 1))  # [S, B, C]
        return self.output_process(self.seqTransEncoder(torch.cat((emb, h)))[1:]).permute(1, 2, 0)


class Recurrent(nn.Module):
    """A GRU over a trajectory, the timestep beside every state."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time, self.gru, self.out = nn.Linear(8, 8), nn.GRU(6 + 8, width, batch_first=True), nn.Linear(width, 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time(waves(t, 8))[:, None].expand(-1, x.shape[1], -1)
        return self.out(self.gru(torch.cat([x, emb], -1))[0])


class StateSpace(nn.Module):
    """Mamba-like: gates, a depthwise convolution, a scan with bare parameters."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter, self.time = nn.Linear(6, 2 * width), nn.Linear(8, width)
        self.conv1d = nn.Conv1d(width, width, 4, groups=width, padding=3)
        self.A, self.B = nn.Parameter(torch.rand(width)), nn.Parameter(torch.randn(width, width) * 0.2)
        self.leave = nn.Linear(width, 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, z = self.enter(x).chunk(2, -1)
        h = F.silu(self.conv1d(h.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)) + self.time(waves(t, 8))[:, None]
        states, state = [], torch.zeros_like(h[:, 0])
        for step in (h @ self.B).unbind(1):
            state = state * self.A.sigmoid() + step
            states.append(state)
        return self.leave(torch.stack(states, 1) * F.silu(z))


class Tabular(nn.Module):
    """TabDDPM: an MLP on rows of a table; layers are a subclass that only starts with other weights."""

    class Linear(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.xavier_uniform_(self.weight)
            nn.init.zeros_(self.bias)

    class Scale(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, x.shape[-1:]) * self.weight

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time_embed, self.proj = nn.Sequential(self.Linear(8, width), nn.SiLU()), self.Linear(6, width)
        self.mlp = nn.Sequential(self.Linear(width, 32), self.Scale(32), nn.ReLU(), self.Linear(32, 6))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.mlp(self.proj(x) + self.time_embed(waves(timesteps, 8)))


class Experts(nn.Module):
    """Each token goes to one expert; some get none."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter, self.leave, self.time = nn.Linear(6, width), nn.Linear(width, 6), nn.Linear(8, width)
        self.gate = nn.Linear(width, 4)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = (self.enter(x) + self.time(waves(t, 8))[:, None]).flatten(0, 1)
        chosen, y = self.gate(h).argmax(-1) % 3, torch.zeros_like(h)  # the fourth is never chosen
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()
            y[rows] = expert(h[rows])
        return self.leave((h + y).unflatten(0, x.shape[:2]))


class Branches(nn.Module):
    """A Python ``if`` on the timestep: other layers early than late; layers called by keyword."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.early, self.late, self.leave = nn.Linear(6, width), nn.Linear(6, width), nn.Linear(width, 6)
        self.time = nn.Linear(8, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        layer = self.early if float(t.max()) > 400 else self.late
        return self.leave(input=F.silu(layer(input=x) + self.time(waves(t, 8))[:, None]))


class Batch(nn.Module):
    """Everything in one dictionary, the timestep too."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter, self.leave, self.time = nn.Linear(6, width), nn.Linear(width, 6), nn.Linear(8, width)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        h = F.silu(self.enter(batch["x"]) + self.time(waves(batch["t"], 8))[:, None])
        return {"x": self.leave(h)}


class Keywords(Batch):
    """Everything through ``**kwargs``."""

    def forward(self, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().forward(kwargs)["x"]
