"""Figures of images against full precision's from the same noise: PSNR, a distance of features, paired intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

STAGES, WIDTH = 3, 32


def psnr(images: np.ndarray, reference: np.ndarray) -> list[float]:
    """Of every image, for values in [0, 1]; at most 120 dB."""
    power = np.square(images.astype(np.float64) - reference).reshape(len(images), -1).mean(1)
    return [float(10 * np.log10(1 / max(each, 1e-12))) for each in power]


@torch.no_grad()
def feature_distance(images: np.ndarray, reference: np.ndarray) -> list[float]:
    """LPIPS' distance (Zhang et al., 2018) over an untrained network: no weights have to be downloaded.

    Three 3 x 3 convolutions of 32 channels with ReLU and pooling between, weights from seed 0; features of unit length
    at every position, squared difference, mean over positions, sum over stages. In that paper random features agree
    with people better than the squared error does, and less well than trained ones.

    Args:
        images: ``[N, H, W, C]`` in [0, 1].
        reference: the same shape.
    """
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.from_numpy(np.ascontiguousarray(each)).permute(0, 3, 1, 2).float() * 2 - 1 for each in (images, reference)
    )
    total = torch.zeros(len(images))
    for _ in range(STAGES):
        weight = torch.randn(WIDTH, x.shape[1], 3, 3, generator=generator) * (2 / (9 * x.shape[1])) ** 0.5
        x, y = (F.conv2d(each, weight, padding=1).relu() for each in (x, y))
        total += (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean((1, 2))
        x, y = (F.avg_pool2d(each, 2) for each in (x, y))
    return total.tolist()


def paired_interval(first: Sequence[float], second: Sequence[float], draws: int = 4000) -> tuple[float, float, float]:
    """Mean of ``first - second`` over the same images, and the bootstrap's interval of 95 % (percentiles, seed 0)."""
    difference = np.asarray(first) - np.asarray(second)
    index = np.random.default_rng(0).integers(0, len(difference), (draws, len(difference)))
    low, high = np.percentile(difference[index].mean(1), [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)
