"""Metrics of images: peak signal-to-noise ratio and structural similarity. Computed in float64.

Shapes: ``B`` images, ``C`` channels, ``H x W`` pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dq_plugins.errors import DQError
from dq_plugins.metrics.base import metric

WINDOW, SIGMA = 11, 1.5
"""Gaussian window of SSIM in pixels, and its standard deviation (Wang et al. 2004)."""

K1, K2 = 0.01, 0.03
"""Stabilising constants of SSIM, relative to the value range (Wang et al. 2004)."""


def value_range_of(reference: Tensor, value_range: float | None) -> float:
    """The given range, or that of the reference's values; 1 for a constant reference."""
    if value_range is None:
        value_range = float(reference.max() - reference.min()) or 1.0
    if not value_range > 0:
        raise DQError(f"the value range of images is positive, got {value_range}")
    return value_range


@metric(higher_is_better=True)
def psnr(reference: Tensor, output: Tensor, *, value_range: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB: mean over the images of ``10 log10(R^2 / MSE)``.

    Args:
        reference: ``[B, ...]``.
        output: the same shape.
        value_range: ``R``, 2 for images in [-1, 1]; by default the range of the reference's values.

    Returns:
        Infinite when an image is equal to its reference.
    """
    peak = value_range_of(reference, value_range)
    errors = (reference - output).square().flatten(1).mean(1) if reference.dim() > 1 else (reference - output).square()
    ratios = [10 * math.log10(peak**2 / e) if e > 0 else math.inf for e in errors.tolist()]
    return sum(ratios) / len(ratios)


def gaussian_window(size: int, device: torch.device) -> Tensor:
    """Separable window ``[size]``, sum 1; sigma shrinks with windows smaller than the usual one."""
    offset = torch.arange(size, dtype=torch.float64, device=device) - (size - 1) / 2
    weights = torch.exp(-(offset**2) / (2 * (SIGMA * size / WINDOW) ** 2))
    return weights / weights.sum()


def blur(x: Tensor, window: Tensor) -> Tensor:
    """Gaussian mean over every full window: ``[N, 1, H, W] -> [N, 1, H - n + 1, W - n + 1]``."""
    return F.conv2d(F.conv2d(x, window[None, None, :, None]), window[None, None, None, :])


def ssim_map(reference: Tensor, output: Tensor, value_range: float) -> Tensor:
    """Structural similarity at every window of float64 images.

    Args:
        reference: ``[B, C, H, W]``.
        output: the same shape.
        value_range: range of the values.

    Returns:
        ``[B, C, H', W']``, at most 1. The window is 11 x 11, smaller in images that are smaller than that.
    """
    batch, channels, height, width = reference.shape
    size = min(WINDOW, (height - 1) // 2 * 2 + 1, (width - 1) // 2 * 2 + 1)
    window = gaussian_window(size, reference.device)
    x, y = (t.reshape(batch * channels, 1, height, width) for t in (reference, output))
    mean_x, mean_y = blur(x, window), blur(y, window)
    # the noise of rounding must not make a variance negative
    variance_x = (blur(x * x, window) - mean_x**2).clamp(min=0)
    variance_y = (blur(y * y, window) - mean_y**2).clamp(min=0)
    covariance = blur(x * y, window) - mean_x * mean_y
    c1, c2 = (K1 * value_range) ** 2, (K2 * value_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    values = luminance * structure
    return values.reshape(batch, channels, *values.shape[-2:])


@metric(higher_is_better=True)
def ssim(reference: Tensor, output: Tensor, *, value_range: float | None = None) -> float:
    """Mean structural similarity of images (Wang et al., IEEE TIP 2004), per channel, Gaussian window.

    Args:
        reference: ``[B, C, H, W]``.
        output: the same shape.
        value_range: range of the values, 2 for images in [-1, 1]; by default the range of the reference's values.

    Returns:
        At most 1, which only equal images reach.
    """
    if reference.dim() != 4:
        raise DQError(f"metric 'ssim' compares images [B, C, H, W]; got shape {tuple(reference.shape)}")
    return float(ssim_map(reference, output, value_range_of(reference, value_range)).mean())
