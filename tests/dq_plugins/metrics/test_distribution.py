from __future__ import annotations

import torch

from dq_plugins.metrics.distribution import frechet


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


def test_order_of_samples_does_not_matter_and_equal_sets_have_distance_zero():
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(2))
    assert frechet(x, x.flip(0)) < 1e-6
