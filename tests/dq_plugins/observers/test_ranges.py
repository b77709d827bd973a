from __future__ import annotations

import pytest
import torch

from dq_plugins.affine import affine_parameters, fake_quantize, integer_range
from dq_plugins.errors import DQError
from dq_plugins.observers.minmax import MinMaxObserver
from dq_plugins.observers.mse import MSEObserver
from dq_plugins.observers.percentile import PercentileObserver


def fed(observer, *tensors):
    for x in tensors:
        observer.update(x)
    return observer


def error(x, observer, power=2.0):
    low, high = observer.range()
    scale, zero = affine_parameters(torch.tensor(low), torch.tensor(high), observer.bits, symmetric=observer.symmetric)
    return float((fake_quantize(x, scale, zero, *integer_range(observer.bits)) - x).abs().double().pow(power).mean())


def heavy(seed=0):
    torch.manual_seed(seed)
    return torch.distributions.StudentT(4.0).sample((20_000,))


def test_minmax_is_exact():
    assert fed(MinMaxObserver(symmetric=False), torch.tensor([-1.0, 3.0]), torch.tensor([5.0])).range() == (-1.0, 5.0)
    assert fed(MinMaxObserver(), torch.tensor([-9.0, 3.0])).range() == (-9.0, 9.0)


@pytest.mark.parametrize("percentile", [99.0, 90.0])
def test_percentile_clips_the_share_it_is_asked_to(percentile):
    x = heavy()
    share = 1 - percentile / 100
    low, high = fed(PercentileObserver(symmetric=False, percentile=percentile), x).range()
    assert float((x < low).float().mean()) == pytest.approx(share / 2, rel=0.1)
    assert float((x > high).float().mean()) == pytest.approx(share / 2, rel=0.1)
    low, high = fed(PercentileObserver(percentile=percentile), x).range()
    assert float((x.abs() > high).float().mean()) == pytest.approx(share, rel=0.1)


def test_percentile_100_is_minmax_and_nonsense_is_refused():
    x = heavy()
    assert fed(PercentileObserver(percentile=100), x).range() == fed(MinMaxObserver(), x).range()
    with pytest.raises(DQError, match="percentile"):
        PercentileObserver(percentile=50)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 6])
def test_mse_beats_the_others_in_squared_error(bits, symmetric):
    x = heavy()
    others = {c.name: error(x, fed(c(bits, symmetric), x)) for c in (MinMaxObserver, PercentileObserver)}
    found = error(x, fed(MSEObserver(bits, symmetric), x))
    assert found <= min(others.values()) * 1.002
    assert found < 0.65 * others["minmax"]


@pytest.mark.parametrize("make", [PercentileObserver, MSEObserver])
def test_merging_equals_seeing_both(make):
    a, b = heavy(0), 3 * heavy(1)
    merged = fed(make(4), a).merge(fed(make(4), b))
    assert merged.range() == pytest.approx(fed(make(4), a, b).range(), rel=1e-6)
