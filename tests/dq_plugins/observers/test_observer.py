from __future__ import annotations

import pytest
import torch

from dq_plugins.errors import CalibrationError, DQError
from dq_plugins.observers import Observer
from dq_plugins.observers.minmax import MinMaxObserver


class Fixed(Observer):
    name = "fixed"
    chosen = (1.0, 2.0)

    def observe(self, values):
        pass

    def absorb(self, other):
        pass

    def choose_range(self):
        return self.chosen


def seen(observer: Observer) -> Observer:
    observer.update(torch.ones(2, 3))
    return observer


def test_the_range_is_made_to_contain_zero():
    assert seen(Fixed(symmetric=False)).range() == (0.0, 2.0)
    assert seen(Fixed(symmetric=True)).range() == (-2.0, 2.0)


@pytest.mark.parametrize("chosen", [(2.0, 1.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_a_range_that_is_none_is_refused(chosen):
    observer = seen(Fixed())
    observer.chosen = chosen
    with pytest.raises(DQError, match="'fixed' chose"):
        observer.range()


def test_counts_and_extremes_are_kept_through_update_and_merge():
    a, b = Fixed(), Fixed()
    a.update(torch.tensor([[1.0, -4.0]]))
    b.update(torch.tensor(7.0))
    a.merge(b)
    assert (a.count, a.low, a.high) == (3, -4.0, 7.0)


def test_only_alike_observers_merge():
    for other in (Fixed(bits=4), Fixed(symmetric=False), MinMaxObserver()):
        with pytest.raises(DQError, match="only observers of one kind"):
            Fixed().merge(other)


def test_nan_says_how_many_and_no_value_says_so():
    with pytest.raises(CalibrationError, match="1 of 3 activations are NaN"):
        Fixed().update(torch.tensor([1.0, torch.nan, 2.0]))
    with pytest.raises(CalibrationError, match="'fixed' has seen no values"):
        Fixed().range()
