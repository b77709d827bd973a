from __future__ import annotations

import pytest
import torch

from dq_plugins.errors import DQError
from dq_plugins.metrics.set_distance import frechet, frechet_distance


def test_it_is_the_distance_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(4000, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5]) + 1.0
    # |m|^2 = 3 and (1 - 1)^2 + (1 - 2)^2 + (1 - 0.5)^2 = 1.25
    assert abs(frechet(x, y) - 4.25) < 0.25


def test_it_matches_the_textbook_formula():
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(50, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    c1, c2 = torch.cov(x.T), torch.cov(y.T)
    root = torch.linalg.eigvals(c1 @ c2).real.clamp(min=0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * root
    assert abs(frechet(x, y) - float(expected)) < 1e-9


def test_more_features_than_samples_and_sets_of_different_size():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(7, 30, generator=generator, dtype=torch.float64)
    y = torch.randn(5, 30, generator=generator, dtype=torch.float64) + 1
    # tr (C1 C2)^(1/2) is the sum of singular values of A1 A2', with C = A' A
    a, b = ((t - t.mean(0)) / (len(t) - 1) ** 0.5 for t in (x, y))
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    expected = float(expected - 2 * torch.linalg.svdvals(a @ b.T).sum())
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_one_sample_has_no_covariance():
    with pytest.raises(DQError, match="two samples"):
        frechet(torch.zeros(1, 3), torch.zeros(1, 3))


def test_order_of_samples_does_not_matter_and_equal_sets_have_distance_zero():
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(2))
    assert frechet(x, x.flip(0)) < 1e-6
