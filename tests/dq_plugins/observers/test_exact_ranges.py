from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_plugins.observers.error import range_errors
from dq_plugins.observers.exact_ranges import exact_range


def dense_search(values, weights, bits, symmetric):
    """Least error over a fine grid of ranges that reach at most to the ends of the values."""
    below, above = max(-float(values.min()), 0.0), max(float(values.max()), 0.0)
    if symmetric:
        high = torch.linspace(0.01, 1, 4000) * max(below, above)
        low = -high
    else:
        part = torch.linspace(0, 1, 120)
        low, high = (x.reshape(-1) for x in torch.meshgrid(-below * part, above * part, indexing="ij"))
    return float(range_errors(values, weights, low, high, bits, symmetric=symmetric).min())


def error_of(values, weights, bits, symmetric):
    low, high = exact_range(values, weights, bits, symmetric=symmetric)
    ends = torch.tensor([low]), torch.tensor([high])
    return float(range_errors(values, weights, *ends, bits, symmetric=symmetric))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("kind", ["normal", "skewed", "positive", "outlier"])
def test_nothing_in_a_dense_grid_is_better(kind, bits, symmetric):
    torch.manual_seed(bits)
    x = torch.randn(200)
    x = {"normal": x, "skewed": torch.nn.functional.silu(3 * x), "positive": x.abs(), "outlier": x}[kind]
    if kind == "outlier":
        x[0] = 40.0
    weights = torch.randint(1, 9, (200,)).double()
    # Relative slack: the sweep computes in float64, the quantizer in float32.
    assert error_of(x, weights, bits, symmetric) <= dense_search(x, weights, bits, symmetric) * (1 + 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-8, 8, width=32, allow_subnormal=False), min_size=1, max_size=8),
    st.integers(2, 4),
    st.booleans(),
)
def test_nothing_is_better_for_a_handful_of_values(numbers, bits, symmetric):
    values = torch.tensor(numbers).unique()
    weights = torch.ones(values.numel(), dtype=torch.float64)
    power = float(values.double().square().mean())
    assert error_of(values, weights, bits, symmetric) <= dense_search(values, weights, bits, symmetric) + 1e-6 * power


def test_values_on_a_lattice_are_represented_exactly():
    values = torch.arange(-7.0, 8.0) * 0.3
    assert error_of(values, torch.ones(15), 4, True) < 1e-12


def test_zeros_alone_give_an_empty_range():
    assert exact_range(torch.zeros(3), torch.ones(3), 8, symmetric=True) == (0.0, 0.0)
