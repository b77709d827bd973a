"""A third denoiser to measure: heights of terrain, 128 x 128, by a consistency model of 10.5 M trained parameters.

The network is the convolutional U-Net of guided diffusion as OpenAI's consistency models use it (Song et al., 2023,
arXiv 2303.01469): 32 channels times 1, 1, 2, 3, 4, four residual blocks a level, attention at 32, 16 and 8 pixels. It
is conditioned on a difficulty in [0, 1]. Its weights are not part of this project: see `benchmarks.terrain_weights`.

Sampling is multistep consistency sampling (Algorithm 1 there) over noise levels of Karras et al. (2022), every image
from noises of its own. The denoiser is the network itself, so its timestep is what the network is given: 250 ln sigma.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.terrain_weights import terrain_weights

SIDE, CHANNELS, MULTIPLIERS, BLOCKS, ATTENTION_LEVELS, EMBEDDED = 128, 32, (1, 1, 2, 3, 4), 4, (2, 3, 4), 128
# below a noise level of about 6 this network leaves a part of the noise in the image, so sampling ends there
SIGMA_DATA, SIGMA_MIN, SIGMA_MAX, SIGMA_LAST, RHO = 0.5, 0.002, 80.0, 6.0, 7.0
STEPS = 8


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


class Residual(nn.Module):
    """Two convolutions; the embedding gives scale and shift of the second norm. ``resize``: 2, 0.5 or 1."""

    def __init__(self, inputs: int, outputs: int, resize: float = 1) -> None:
        super().__init__()
        self.resize = resize
        self.in_layers = nn.Sequential(_norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(EMBEDDED, 2 * outputs))
        self.out_layers = nn.Sequential(
            _norm(outputs), nn.SiLU(), nn.Identity(), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def _resized(self, x: Tensor) -> Tensor:
        if self.resize > 1:
            return F.interpolate(x, scale_factor=self.resize, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resize < 1 else x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, activation, convolution = self.in_layers
        hidden = convolution(self._resized(activation(norm(x))))
        scale, shift = self.emb_layers(embedding)[..., None, None].chunk(2, dim=1)  # each [B, C, 1, 1]
        hidden = self.out_layers[0](hidden) * (1 + scale) + shift
        return self.skip_connection(self._resized(x)) + self.out_layers[1:](hidden)


class Attention(nn.Module):
    """Self-attention over pixels, heads of 32 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.qkv = _norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        batch, channels, *_ = x.shape
        qkv = (
            self.qkv(self.norm(x)).reshape(batch, 3, channels // 32, 32, -1).transpose(-1, -2)
        )  # [B, 3, H, pixels, 32]
        mixed = F.scaled_dot_product_attention(*qkv.unbind(1))
        return x + self.proj_out(mixed.transpose(-1, -2).reshape(x.shape))


def _level(inputs: int, outputs: int, level: int) -> list[nn.Module]:
    return [Residual(inputs, outputs), *([Attention(outputs)] if level in ATTENTION_LEVELS else [])]


class TerrainUNet(nn.Module):
    """The network; parameters are named as in guided diffusion."""

    def __init__(self) -> None:
        super().__init__()
        widths = [CHANNELS * m for m in MULTIPLIERS]
        self.time_embed = nn.Sequential(nn.Linear(CHANNELS, EMBEDDED), nn.SiLU(), nn.Linear(EMBEDDED, EMBEDDED))
        self.label_emb = nn.Sequential(nn.Linear(1, EMBEDDED), nn.SiLU(), nn.Linear(EMBEDDED, EMBEDDED))
        down: list[list[nn.Module]] = [[nn.Conv2d(1, CHANNELS, 3, padding=1)]]
        kept, channels = [CHANNELS], CHANNELS
        for level, width in enumerate(widths):
            for _ in range(BLOCKS):
                down.append(_level(channels, width, level))
                channels = width
                kept.append(channels)
            if level + 1 < len(widths):
                down.append([Residual(channels, channels, 0.5)])
                kept.append(channels)
        up: list[list[nn.Module]] = []
        for level, width in reversed([*enumerate(widths)]):
            for block in range(BLOCKS + 1):
                up.append(_level(channels + kept.pop(), width, level))
                channels = width
                if level and block == BLOCKS:
                    up[-1].append(Residual(channels, channels, 2))
        deepest = widths[-1]
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, down))
        self.middle_block = nn.ModuleList([Residual(deepest, deepest), Attention(deepest), Residual(deepest, deepest)])
        self.output_blocks = nn.ModuleList(map(nn.ModuleList, up))
        self.out = nn.Sequential(_norm(channels), nn.SiLU(), nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, sample: Tensor, timestep: Tensor, difficulty: Tensor) -> Tensor:
        """The network's output ``[B, 1, 128, 128]`` for a scaled sample of that shape; the other two are ``[B]``."""
        frequencies = torch.exp(torch.arange(CHANNELS // 2, device=sample.device) * (-math.log(1e4) * 2 / CHANNELS))
        angles = timestep[:, None].to(sample.dtype) * frequencies  # [B, 16]
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        embedding = embedding + self.label_emb(difficulty[:, None].to(sample.dtype))
        hidden, skips = self.input_blocks[0][0](sample), []
        skips.append(hidden)
        for block in self.input_blocks[1:]:
            for module in block:
                hidden = module(hidden, embedding)
            skips.append(hidden)
        for module in self.middle_block:
            hidden = module(hidden, embedding)
        for block in self.output_blocks:
            hidden = torch.cat([hidden, skips.pop()], dim=1)
            for module in block:
                hidden = module(hidden, embedding)
        return self.out(hidden)


def terrain_denoiser() -> TerrainUNet:
    """The network with its trained weights, in eval mode, without gradients."""
    network = TerrainUNet()
    norms = [f"{name}." for name, module in network.named_modules() if isinstance(module, nn.GroupNorm)]
    network.load_state_dict(terrain_weights(norms))
    return network.eval().requires_grad_(False)


def noise_levels(steps: int) -> Tensor:
    """``steps`` noise levels from 80 down to 6, evenly spaced in their seventh root; float64."""
    last, first = SIGMA_LAST ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    return torch.linspace(first, last, steps, dtype=torch.float64) ** RHO


def denoised(network: nn.Module, noisy: Tensor, sigma: float, difficulty: Tensor) -> Tensor:
    """The consistency function: the image that ``noisy`` at noise level ``sigma`` leads to, in [-1, 1]."""
    skip = SIGMA_DATA**2 / ((sigma - SIGMA_MIN) ** 2 + SIGMA_DATA**2)
    gain = (sigma - SIGMA_MIN) * SIGMA_DATA / math.hypot(sigma, SIGMA_DATA)
    timestep = torch.full((len(noisy),), 250 * math.log(sigma))
    output = network(sample=noisy / math.hypot(sigma, SIGMA_DATA), timestep=timestep, difficulty=difficulty)
    return (gain * output + skip * noisy).clamp(-1, 1)


@dataclass(frozen=True)
class TerrainSampler:
    """Draws images as a pipeline's sampler does: image ``i`` has the noises and the difficulty of seed ``seed + i``."""

    images: int
    seed: int
    batch: int = 4
    steps: int = STEPS

    @property
    def total(self) -> int:
        """Number of calls of the denoiser."""
        return self.steps * -(-self.images // self.batch)

    @torch.no_grad()
    def __call__(self, denoiser: nn.Module) -> list[SimpleNamespace]:
        """Batches with ``images``, ``[B, 128, 128, 1]`` in [0, 1], as numpy arrays."""
        seeds = range(self.seed, self.seed + self.images)
        return [self._run(denoiser, seeds[a : a + self.batch]) for a in range(0, self.images, self.batch)]

    def _run(self, denoiser: nn.Module, seeds: range) -> SimpleNamespace:
        # the golden ratio spreads any run of seeds over the difficulties
        difficulty = torch.tensor([seed * (math.sqrt(5) - 1) / 2 % 1 for seed in seeds], dtype=torch.float32)
        noises = self._noises(seeds)
        image = torch.zeros(len(seeds), 1, SIDE, SIDE)
        for step, sigma in enumerate(noise_levels(self.steps).tolist()):
            added = math.sqrt(sigma**2 - SIGMA_MIN**2) if step else sigma
            image = denoised(denoiser, image + added * next(noises), sigma, difficulty)
        return SimpleNamespace(images=np.asarray((image + 1) / 2).transpose(0, 2, 3, 1))

    @staticmethod
    def _noises(seeds: range) -> Iterator[Tensor]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        while True:
            yield torch.cat([torch.randn(1, 1, SIDE, SIDE, generator=each) for each in generators])
