"""Convolutional denoisers as people write them without diffusers, each in the manner of a known code."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def waves(t: Tensor, width: int) -> Tensor:
    """Sines and cosines ``[B, width]``."""
    angles = t.reshape(-1, 1).float() * torch.exp(-math.log(1e4) * torch.arange(width // 2) / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], 1)


class GuidedBlock(nn.Module):
    """Residual block; the timestep scales and shifts the normalised features."""

    def __init__(self, width: int, out: int, emb: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out))
        self.out_layers = nn.Sequential(nn.GroupNorm(4, out), nn.SiLU(), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.emb_layers(emb)[..., None, None].chunk(2, 1)
        h = self.out_layers[0](self.in_layers(x)) * (1 + scale) + shift
        return self.skip_connection(x) + self.out_layers[1:](h)


class GuidedAttention(nn.Module):
    """Self-attention of pixels by 1-d convolutions, heads folded into the batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(4, width), nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *size = x.shape
        flat = x.reshape(b, c, -1)
        q, k, v = self.qkv(self.norm(flat)).reshape(b * 2, -1, flat.shape[-1]).split(c // 2, 1)
        weight = torch.einsum("bct,bcs->bts", q * c**-0.25, k * c**-0.25).softmax(-1)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, -1)
        return (flat + self.proj_out(h)).reshape(b, c, *size)


class GuidedUNet(nn.Module):
    """guided-diffusion: ``forward(x, timesteps, y)``, features kept on a stack."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(width, 32), nn.SiLU(), nn.Linear(32, 32))
        self.label_emb = nn.Embedding(4, 32)
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList([GuidedBlock(width, width, 32), GuidedBlock(width, 2 * width, 32)])
        self.pool, self.attention = nn.Conv2d(width, width, 3, 2, 1), GuidedAttention(2 * width)
        self.up = nn.ModuleList([GuidedBlock(3 * width, width, 32), GuidedBlock(2 * width, width, 32)])
        self.out = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 6, 3, padding=1))
        self.width = width

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time_embed(waves(timesteps, self.width)) + self.label_emb(y)
        hs = [self.enter(x.type(torch.float32))]
        hs.append(self.down[0](hs[-1], emb))
        h = self.attention(self.down[1](self.pool(hs[-1]), emb))
        h = F.interpolate(h, scale_factor=2, mode="nearest")
        for block in self.up:
            h = block(torch.cat([h, hs.pop()], 1), emb)
        return self.out(h)


class EdmConv(nn.Module):
    """Convolution of EDM: a module of its own whose weight is cast at each call."""

    def __init__(self, width: int, out: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, width, kernel, kernel) * 0.1)
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight.to(x.dtype), padding=self.weight.shape[-1] // 2)
        return y.add_(self.bias.to(x.dtype).reshape(1, -1, 1, 1))


class EdmLinear(nn.Module):
    """Linear layer of EDM: the product written out."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out, width) * 0.1), nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.to(x.dtype).t()).add_(self.bias.to(x.dtype))


class Edm(nn.Module):
    """EDM with its preconditioning: ``forward(x, sigma)``."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.map_layer0, self.map_layer1 = EdmLinear(width, 32), EdmLinear(32, 32)
        self.enter, self.conv0 = EdmConv(3, width, 3), EdmConv(width, width, 3)
        self.affine, self.conv1, self.out = EdmLinear(32, 2 * width), EdmConv(width, width, 3), EdmConv(width, 3, 3)
        self.width = width

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        skip, out, enter = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25).sqrt(), 1 / (s**2 + 0.25).sqrt()
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(waves(s.log() / 4, self.width)))))
        h = self.conv0(F.silu(self.enter(enter * x)))
        scale, shift = self.affine(emb)[..., None, None].chunk(2, 1)
        h = h + self.conv1(F.silu(torch.addcmul(shift, h, scale + 1)))
        return skip * x + out * self.out(h)


class StandardizedConv(nn.Conv2d):
    """lucidrains: the weight is standardised at each call, so it is not what the layer computes with."""

    def forward(self, input: Tensor) -> Tensor:
        mean, var = self.weight.mean((1, 2, 3), True), self.weight.var((1, 2, 3), unbiased=False, keepdim=True)
        weight = (self.weight - mean) * (var + 1e-5).rsqrt()
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class LucidUNet(nn.Module):
    """denoising-diffusion-pytorch: ``forward(x, time, x_self_cond)``, linear attention, transposed upsampling."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.random = nn.Parameter(torch.randn(4), requires_grad=False)
        self.time_mlp = nn.Sequential(nn.Linear(9, 32), nn.GELU(), nn.Linear(32, 32))
        self.init_conv = nn.Conv2d(6, width, 7, padding=3)
        self.mlp, self.proj = nn.Linear(32, 2 * width), StandardizedConv(width, width, 3, padding=1)
        self.to_qkv, self.to_out = nn.Conv2d(width, 48, 1, bias=False), nn.Conv2d(16, width, 1)
        self.down, self.up = nn.Conv2d(width, width, 4, 2, 1), nn.ConvTranspose2d(width, width, 4, 2, 1)
        self.final = nn.Conv2d(width, 3, 1)
        self.g = nn.Parameter(torch.ones(1, width, 1, 1))

    def forward(self, x: Tensor, time: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        x = self.init_conv(torch.cat((torch.zeros_like(x) if x_self_cond is None else x_self_cond, x), 1))
        angles = time[:, None].float() * self.random[None] * 2 * math.pi
        t = self.time_mlp(torch.cat((time[:, None].float(), angles.sin(), angles.cos()), 1))
        scale, shift = self.mlp(F.silu(t))[..., None, None].chunk(2, 1)
        h = F.silu(self.proj(self.down(x)) * (scale + 1) + shift)
        normed = F.normalize(h, dim=1) * self.g * h.shape[1] ** 0.5
        q, k, v = (y.reshape(len(y), 2, 8, -1) for y in self.to_qkv(normed).chunk(3, 1))
        context = torch.einsum("bhdn,bhen->bhde", k.softmax(-1), v)
        attended = torch.einsum("bhde,bhdn->bhen", context, q.softmax(-2) * 8**-0.5)
        return self.final(self.up(h + self.to_out(attended.reshape(len(h), 16, *h.shape[2:]))) + x)


class Nin(nn.Module):
    """score_sde: a 1 x 1 convolution as a product with a bare parameter ``[C, O]``."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.randn(width, out) * 0.2), nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tensordot(x.permute(0, 2, 3, 1), self.W, 1) + self.b).permute(0, 3, 1, 2)


class ScoreNet(nn.Module):
    """score_sde: ``forward(x, time_cond)``, fixed Fourier features of log sigma, products with bare parameters."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(width // 2), requires_grad=False)
        self.dense0, self.dense1 = nn.Linear(width, 32), nn.Linear(32, width)
        self.enter, self.nin, self.leave = (
            nn.Conv2d(3, width, 3, padding=1),
            Nin(width, width),
            nn.Conv2d(width, 3, 3, padding=1),
        )

    def forward(self, x: Tensor, time_cond: Tensor) -> Tensor:
        angles = torch.log(time_cond)[:, None] * self.W[None] * 2 * math.pi
        temb = self.dense1(F.silu(self.dense0(torch.cat([angles.sin(), angles.cos()], 1))))
        h = F.silu(self.enter(x) + temb[:, :, None, None])
        return self.leave(h + self.nin(h)) / time_cond[:, None, None, None]


class PolicyUNet(nn.Module):
    """diffusion policy: a 1-d U-Net over actions ``[B, T, A]``, conditioned by FiLM."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.step = nn.Sequential(nn.Linear(8, 32), nn.Mish(), nn.Linear(32, 8))
        self.down = nn.Sequential(nn.Conv1d(2, width, 5, padding=2), nn.GroupNorm(4, width), nn.Mish())
        self.film = nn.Sequential(nn.Mish(), nn.Linear(8 + 6, 2 * width), nn.Unflatten(-1, (-1, 1)))
        self.halve, self.back = nn.Conv1d(width, width, 3, 2, 1), nn.ConvTranspose1d(width, width, 4, 2, 1)
        self.out = nn.Conv1d(width, 2, 1)

    def forward(self, sample: Tensor, timestep: Tensor, global_cond: Tensor) -> Tensor:
        x = self.down(sample.moveaxis(-1, -2))
        scale, bias = self.film(torch.cat([self.step(waves(timestep, 8)), global_cond], -1)).chunk(2, 1)
        return self.out(self.back(self.halve(scale * x + bias)) + x).moveaxis(-1, -2)


class DiffWave(nn.Module):
    """DiffWave: gated dilated convolutions with weight norm, steps looked up in a table, a spectrogram upsampled."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.register_buffer("table", waves(torch.arange(1000.0), 16), persistent=False)
        self.p1, self.p2 = nn.Linear(16, 32), nn.Linear(32, width)
        self.upsample = nn.ConvTranspose2d(1, 1, (3, 8), (1, 4), (1, 2))
        self.enter = nn.Conv1d(1, width, 1)
        self.dilated = norm(nn.Conv1d(width, 2 * width, 3, padding=4, dilation=4))
        self.mel, self.out = nn.Conv1d(5, 2 * width, 1), nn.Conv1d(width, 1, 1)

    def forward(self, audio: Tensor, diffusion_step: Tensor, spectrogram: Tensor) -> Tensor:
        step = F.silu(self.p2(F.silu(self.p1(self.table[diffusion_step]))))
        cond = self.mel(F.leaky_relu(self.upsample(spectrogram[:, None]), 0.4)[:, 0])
        x = F.relu(self.enter(audio[:, None]))
        gate, value = (self.dilated(x + step[..., None]) + cond).chunk(2, 1)
        return self.out(gate.sigmoid() * value.tanh() + x)[:, 0]


class VideoNet(nn.Module):
    """Imagen-video style: 3-d convolutions apart in space and time, one timestep per frame ``[B, T]``."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.time = nn.Linear(8, width)
        self.space, self.frames = (
            nn.Conv3d(3, width, (1, 3, 3), padding=(0, 1, 1)),
            nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0)),
        )
        self.tokens, self.out = nn.Linear(width, width), nn.ConvTranspose3d(width, 3, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time(waves(t, 8)).unflatten(0, t.shape)  # [B, T, C]
        h = F.silu(self.space(x) + emb.transpose(1, 2)[..., None, None])
        h = h + self.frames(h)
        tokens = self.tokens(h.permute(0, 2, 3, 4, 1).flatten(1, 3))  # [B, T H W, C]
        return self.out(F.silu(h + tokens.transpose(1, 2).reshape(h.shape)))
