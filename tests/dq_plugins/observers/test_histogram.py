from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_plugins.observers.histogram import Histogram

numbers = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
batches = st.lists(st.lists(numbers, min_size=1, max_size=30), min_size=1, max_size=5)


def histogram_of(*parts: list[float], bins: int = 16) -> Histogram:
    histogram = Histogram(bins)
    for part in parts:
        x = torch.tensor(part)
        histogram.update(x, float(x.min()), float(x.max()))
    return histogram


def bins_of(histogram: Histogram) -> tuple[int, dict[int, int]]:
    filled = {histogram.first + i: int(c) for i, c in enumerate(histogram.counts) if c}
    return histogram.exponent, filled


@settings(deadline=None)
@given(batches)
def test_bins_depend_on_the_values_alone(parts):
    whole = histogram_of([x for part in parts for x in part])
    assert bins_of(histogram_of(*parts)) == bins_of(histogram_of(*reversed(parts))) == bins_of(whole)
    merged = Histogram(16)
    for part in parts:
        merged.merge(histogram_of(part))
    assert bins_of(merged) == bins_of(whole)


@settings(deadline=None)
@given(batches)
def test_nothing_is_lost(parts):
    histogram = histogram_of(*parts)
    values, weights = histogram.points()
    everything = torch.tensor([x for part in parts for x in part], dtype=torch.float64)
    assert float(weights.sum()) == everything.numel()
    assert histogram.counts.numel() <= histogram.bins
    assert float(histogram.sums.sum()) == pytest.approx(float(everything.sum()), rel=1e-9, abs=1e-6)
    assert bool((values.diff() > 0).all())
    assert float(everything.min()) <= float(values[0])
    assert float(values[-1]) <= float(everything.max())


def test_few_values_are_kept_as_they_are():
    torch.manual_seed(0)
    x = torch.randn(50).sort().values
    values, weights = histogram_of(x.tolist(), bins=1 << 16).points()
    assert torch.equal(values, x)
    assert torch.equal(weights, torch.ones(50, dtype=torch.float64))


def test_at_least_half_of_the_bins_cover_the_range():
    x = torch.linspace(-1.3, 2.9, 100_000).tolist()
    assert 512 <= histogram_of(x, bins=1024).counts.numel() <= 1024


@pytest.mark.parametrize("x", [[0.0], [3.7] * 9, [-1e-30, 1e-30], [1e30], [1e-30, 1e6]])
def test_extreme_values_neither_overflow_nor_vanish(x):
    values, weights = histogram_of(x).points()
    assert float(weights.sum()) == len(x)
    assert float(values.max()) == pytest.approx(max(x))
