from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from dq_plugins.errors import DQError
from dq_plugins.metrics import psnr, ssim


def images(size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return F.interpolate(torch.rand(2, 3, 4, 4, generator=generator), size=(size, size), mode="bicubic") * 2 - 1


def test_psnr_by_hand():
    x = torch.zeros(2, 1, 4, 4)
    y = x.clone()
    y[0] += 0.1
    y[1] += 0.01
    assert psnr(x, y, value_range=1) == pytest.approx((20 + 40) / 2)


def test_psnr_of_equal_images_is_infinite():
    assert psnr(images(), images()) == math.inf


def slow_ssim(x: torch.Tensor, y: torch.Tensor, value_range: float) -> float:
    """Straight from the paper's definition, window by window."""
    offset = torch.arange(11, dtype=torch.float64) - 5
    g = torch.exp(-(offset**2) / (2 * 1.5**2))
    window = torch.outer(g, g) / g.sum() ** 2
    c1, c2 = (0.01 * value_range) ** 2, (0.03 * value_range) ** 2
    values = []
    for a, b in zip(x.flatten(0, 1).double(), y.flatten(0, 1).double(), strict=True):
        for i in range(a.shape[0] - 10):
            for j in range(a.shape[1] - 10):
                p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(torch.stack(values).mean())


def test_ssim_is_the_papers_definition():
    x = images(16)
    y = (x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    assert ssim(x, y, value_range=2) == pytest.approx(slow_ssim(x, y, 2), abs=1e-10)


def test_ssim_falls_more_for_lost_structure_than_for_a_shift_of_brightness():
    x = images()
    shuffled = x.flatten(2)[..., torch.randperm(32 * 32, generator=torch.Generator().manual_seed(0))].reshape(x.shape)
    assert ssim(x, x, value_range=2) == pytest.approx(1)
    assert ssim(x, x + 0.1, value_range=2) > 0.7
    assert ssim(x, shuffled, value_range=2) < 0.3


def test_ssim_of_constant_and_of_small_images():
    flat = torch.full((1, 1, 16, 16), 0.5)
    assert ssim(flat, flat) == pytest.approx(1)
    small = images(8)
    assert 0 < ssim(small, small + 0.3 * torch.randn(small.shape)) < 1
    assert ssim(small[..., :1, :1], small[..., :1, :1]) == pytest.approx(1)


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_value_range_must_be_positive(bad: float):
    with pytest.raises(DQError, match="positive"):
        ssim(images(), images(), value_range=bad)


def test_ssim_needs_images():
    with pytest.raises(DQError, match=r"\[B, C, H, W\]"):
        ssim(torch.zeros(4, 4), torch.zeros(4, 4))
