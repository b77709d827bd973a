"""The task that `binarydm.py` trains on: images, a small U-Net in plain PyTorch, its diffusion, and feature distances.

Nothing here needs diffusers or a download: digits come with scikit-learn, other images as an ``.npz`` with ``images``
``[N, H, W, 3]`` (uint8) and optionally ``category`` ``[N]``.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,   L_simple = mean (eps - eps_theta(x_t, t))^2     DDPM, eq. 14

Shapes: images ``[B, C, H, W]`` in [-1, 1], timesteps int64 ``[B]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIMESTEPS = 1000


@dataclass(frozen=True)
class Images:
    """Training images and their classes (for the feature network only)."""

    pixels: Tensor
    classes: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.pixels.shape[1:])


def load_images(source: str, device: str) -> Images:
    """``"digits"`` (16 x 16), ``"digits8"`` (8 x 8, as they are), or the path of an ``.npz``."""
    if source in ("digits", "digits8"):
        from sklearn.datasets import load_digits

        data = load_digits()
        pixels = torch.from_numpy(data.images).float()[:, None] / 8 - 1
        if source == "digits":
            pixels = F.interpolate(pixels, size=16, mode="bilinear", align_corners=False)
        return Images(pixels.to(device), torch.from_numpy(data.target).long().to(device))
    with np.load(Path(source), allow_pickle=False) as data:
        pixels = torch.from_numpy(data["images"]).permute(0, 3, 1, 2).float() / 127.5 - 1
        classes = np.unique(data["category"], return_inverse=True)[1] if "category" in data else np.zeros(len(pixels))
    return Images(pixels.to(device), torch.from_numpy(classes).long().to(device))


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with the timestep added in between."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(embedding, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(emb)[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class UNet(nn.Module):
    """Unconditional U-Net: at each resolution two blocks down, a skip and two blocks up; one block in the middle."""

    def __init__(self, image_channels: int, width: int = 32, multipliers: tuple[int, ...] = (1, 2, 4)) -> None:
        super().__init__()
        emb, sizes = 4 * width, [width * m for m in multipliers]
        self.width = width
        self.embed1, self.embed2 = nn.Linear(width, emb), nn.Linear(emb, emb)
        self.enter = nn.Conv2d(image_channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        channels = width
        for size in sizes:
            self.down.extend([ResidualBlock(channels, size, emb), ResidualBlock(size, size, emb)])
            channels = size
        self.shrink.extend(nn.Conv2d(size, size, 3, stride=2, padding=1) for size in sizes[:-1])
        self.middle = ResidualBlock(channels, channels, emb)
        for size in reversed(sizes):
            self.up.extend([ResidualBlock(channels + size, size, emb), ResidualBlock(size, size, emb)])
            channels = size
        self.grow.extend(nn.Conv2d(size, size, 3, padding=1) for size in reversed(sizes[1:]))
        self.norm, self.leave = nn.GroupNorm(8, channels), nn.Conv2d(channels, image_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        emb, x, skips = self.embedding(timestep), self.enter(sample), []
        for level in range(len(self.shrink) + 1):
            x = self.down[2 * level + 1](self.down[2 * level](x, emb), emb)
            skips.append(x)
            if level < len(self.shrink):
                x = self.shrink[level](x)
        x = self.middle(x, emb)
        for level in range(len(skips)):
            x = self.up[2 * level](torch.cat([x, skips.pop()], 1), emb)
            x = self.up[2 * level + 1](x, emb)
            if level < len(self.grow):
                x = self.grow[level](F.interpolate(x, scale_factor=2))
        return self.leave(F.silu(self.norm(x)))

    def embedding(self, timestep: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(torch.arange(half, device=timestep.device) * (-math.log(10000) / half))
        angles = timestep.float()[:, None] * rates
        return F.silu(self.embed2(F.silu(self.embed1(torch.cat([angles.sin(), angles.cos()], 1)))))


class Diffusion:
    """Linear noise schedule; loss and DDIM sampling (Song et al. 2021, equation 12, eta = 0)."""

    def __init__(self, device: str) -> None:
        betas = torch.linspace(1e-4, 0.02, TIMESTEPS, device=device)
        self.signal = torch.cumprod(1 - betas, 0)
        self.device = device

    def batch(self, images: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy images, timesteps and the noise; a function of the seed alone, so that a resumed run repeats it."""
        rng = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(images), (size,), generator=rng).to(images.device)
        t = torch.randint(TIMESTEPS, (size,), generator=rng).to(images.device)
        noise = torch.randn(size, *images.shape[1:], generator=rng).to(images.device)
        signal = self.signal[t].view(-1, 1, 1, 1)
        return signal.sqrt() * images[rows] + (1 - signal).sqrt() * noise, t, noise

    @torch.no_grad()
    def sample(self, model: nn.Module, shape: tuple[int, ...], steps: int, seed: int) -> Tensor:
        """DDIM samples from the noise of ``seed``."""
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        schedule = torch.linspace(TIMESTEPS - 1, 0, steps).long().tolist()
        for t, following in zip(schedule, [*schedule[1:], -1], strict=True):
            noise = model(x, torch.full((len(x),), t, device=self.device))
            now = self.signal[t]
            after = self.signal[following] if following >= 0 else torch.ones((), device=self.device)
            clean = ((x - (1 - now).sqrt() * noise) / now.sqrt()).clamp(-1, 1)
            direction = (x - now.sqrt() * clean) / (1 - now).sqrt()
            x = after.sqrt() * clean + (1 - after).sqrt() * direction
        return x


class FeatureNet(nn.Module):
    """A small classifier of the training images; its last hidden layer is where generated images are compared."""

    def __init__(self, image_channels: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(image_channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 64),
        )
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x)))


def train_feature_net(images: Images, steps: int = 600) -> FeatureNet:
    """Train the classifier."""
    torch.manual_seed(0)
    net = FeatureNet(images.shape[0], int(images.classes.max()) + 1).to(images.pixels.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    rng = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(images.pixels), (128,), generator=rng).to(images.pixels.device)
        optimizer.zero_grad()
        F.cross_entropy(net(images.pixels[rows]), images.classes[rows]).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)
