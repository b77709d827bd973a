from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dq_plugins.errors import DQError
from dq_plugins.metrics import ssim
from dq_plugins.sensitivity.probes import signs
from dq_plugins.sensitivity.similarity import SsimForm


def image(size: int = 32) -> torch.Tensor:
    x = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return F.interpolate(x, size=(size, size), mode="bicubic") * 2 - 1


def noise(kind: str, size: int = 32) -> torch.Tensor:
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    return x if kind == "fine" else 3 * F.avg_pool2d(x, 9, stride=1, padding=4)


def value(form: SsimForm, error: torch.Tensor) -> float:
    """1 - SSIM of one image, to second order."""
    return sum(float(form.coordinates(p, error.double()).square().sum()) for p in ("structure", "texture"))


@pytest.mark.parametrize("kind", ["fine", "coarse"])
def test_value_is_one_minus_ssim_for_small_errors(kind: str):
    x, error = image(), 0.01 * noise(kind)
    assert value(SsimForm(x), error) == pytest.approx(1 - ssim(x, x + error), rel=0.3)


def test_coarse_errors_are_structure_and_fine_ones_texture():
    form = SsimForm(image())
    for kind, part in (("fine", "texture"), ("coarse", "structure")):
        error = 0.01 * noise(kind).double()
        share = float(form.coordinates(part, error).square().sum()) / value(form, error)
        assert share > 0.6


def test_constants_on_a_flat_image_are_those_of_the_paper():
    flat, value_range, amplitude = torch.zeros(1, 1, 24, 24), 2.0, 1e-3
    form = SsimForm(flat, value_range)
    c1, c2 = (0.01 * value_range) ** 2, (0.03 * value_range) ** 2
    shift = torch.full_like(flat, amplitude)  # no variance anywhere: 1 - SSIM = m^2 / (m^2 + c1)
    assert value(form, shift) == pytest.approx(amplitude**2 / (amplitude**2 + c1), rel=0.01)
    checks = amplitude * (-1.0) ** (torch.arange(24)[:, None] + torch.arange(24))[None, None]
    assert value(form, checks) == pytest.approx(amplitude**2 / (amplitude**2 + c2), rel=0.01)  # no mean
    for error in (shift, checks):
        assert value(form, error) == pytest.approx(1 - ssim(flat, error, value_range=value_range), rel=0.01)


@pytest.mark.parametrize("part", ["structure", "texture"])
def test_probes_recover_the_value(part):
    form, error = SsimForm(image(16)), 0.01 * noise("fine", 16)
    generator = torch.Generator().manual_seed(0)
    probes = [form.cotangent(part, signs(error.shape, generator)) for _ in range(400)]
    estimate = sum(float((p.double() * error).sum() ** 2) for p in probes) / 400
    assert estimate == pytest.approx(float(form.coordinates(part, error.double()).square().sum()), rel=0.25)


def test_samples_that_are_no_images_are_refused():
    with pytest.raises(DQError, match=r"\[B, C, H, W\].*another metric"):
        SsimForm(torch.zeros(2, 5))
