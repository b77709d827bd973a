from __future__ import annotations

import pytest
import torch

from dq_plugins.observers.candidate_ranges import ASYMMETRIC_LIMIT, FLOOR, RATIO, SYMMETRIC_LIMIT, candidate_ranges
from dq_plugins.observers.error import range_errors
from dq_plugins.observers.mse import MSEObserver


def signals(kind: str) -> list[torch.Tensor]:
    """Eight timesteps whose scale grows by 20."""
    torch.manual_seed(0)
    scales = torch.logspace(0, 1.3, 8)
    x = torch.randn(8, 3000)
    if kind == "silu":
        return [torch.nn.functional.silu(s * row) for s, row in zip(scales, x, strict=True)]
    if kind == "positive":
        return [s * row.abs() for s, row in zip(scales, x, strict=True)]
    return [s * row for s, row in zip(scales, x, strict=True)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("kind", ["normal", "silu", "positive"])
def test_every_timestep_and_every_run_has_a_candidate_near_its_best(kind, bits, symmetric):
    rows = signals(kind)
    low, high = (torch.stack([f(row) for row in rows]) for f in (torch.min, torch.max))
    lows, highs = candidate_ranges(low, high, symmetric=symmetric)
    for run in (slice(0, 1), slice(7, 8), slice(2, 5), slice(0, 8)):
        values = torch.cat(rows[run])
        weights = torch.ones_like(values)
        observer = MSEObserver(bits, symmetric)
        observer.update(values)
        best = torch.tensor(observer.range())[:, None]
        reference = float(range_errors(values, weights, best[0], best[1], bits, symmetric=symmetric))
        found = float(range_errors(values, weights, lows, highs, bits, symmetric=symmetric).min())
        assert found <= reference * 1.08


def test_symmetric_candidates_are_even_in_the_logarithm_and_hold_every_timestep():
    low, high = torch.tensor([-1.0, -8.0, -100.0]), torch.tensor([2.0, 3.0, 50.0])
    lows, highs = candidate_ranges(low, high, symmetric=True)
    assert torch.equal(lows, -highs)
    assert float(highs[0]) == 100
    assert float(highs[-1]) == pytest.approx(2 * FLOOR)
    assert {2.0, 8.0, 100.0} <= set(highs.tolist())
    assert float((highs[:-1] / highs[1:]).max()) <= RATIO + 1e-5


@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_contain_zero_and_their_number_is_bounded(symmetric):
    low, high = -torch.logspace(-6, 6, 200), torch.logspace(-3, 4, 200)
    lows, highs = candidate_ranges(low, high, symmetric=symmetric)
    assert bool((lows <= 0).all())
    assert bool((highs >= 0).all())
    assert lows.numel() <= (SYMMETRIC_LIMIT if symmetric else ASYMMETRIC_LIMIT) + 300


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_that_are_always_zero_have_the_empty_range(symmetric):
    lows, highs = candidate_ranges(torch.zeros(3), torch.zeros(3), symmetric=symmetric)
    assert float(lows.abs().max()) == float(highs.max()) == 0


def test_one_sided_inputs_have_one_sided_candidates():
    lows, _ = candidate_ranges(torch.zeros(2), torch.tensor([1.0, 5.0]), symmetric=False)
    assert float(lows.min()) == 0
