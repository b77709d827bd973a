from __future__ import annotations

import pytest
import torch

import dq_plugins as dq
from dq_plugins.testing import ObserverConformance


class TestConformance(ObserverConformance):
    name = "three-sigma"


def test_one_outlier_does_not_set_the_range():
    observer = dq.get("observer", "three-sigma")(bits=8, symmetric=False)
    observer.update(torch.tensor([-1.0, 1.0]).repeat(1000))
    observer.update(torch.tensor([100.0]))
    low, high = observer.range()
    assert low == -1.0  # never beyond what was seen
    assert 3.0 < high < 10.0


def test_streamed_variance_is_that_of_the_whole():
    values = 1000 + torch.randn(5, 400, generator=torch.Generator().manual_seed(0)).double()
    observer = dq.get("observer", "three-sigma")(bits=8, symmetric=False, sigmas=2.0)
    for batch in values:
        observer.update(batch)
    seen = values.float().double()
    assert observer.range()[1] == pytest.approx(float(seen.mean() + 2 * seen.std(correction=0)), rel=1e-12)


def test_width_of_the_range_must_be_positive():
    with pytest.raises(dq.DQError, match="sigmas > 0, got 0"):
        dq.get("observer", "three-sigma")(sigmas=0)
