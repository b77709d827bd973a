from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dq_plugins.errors import BudgetError
from dq_plugins.passes.steps.intervals import StepIntervals, quadratic_bounds, step_intervals

THOUSAND = tuple(float(t) for t in range(1000))


def test_quadratic_bounds_are_those_of_the_paper():
    assert quadratic_bounds(0, 1000, 10) == [9, 39, 88, 158, 246, 355, 483, 632, 800]
    assert quadratic_bounds(0, 1000, 4) == [88, 355, 800]


@pytest.mark.parametrize("method", ["quadratic", "uniform", "change"])
@given(count=st.integers(1, 40))
def test_intervals_partition_the_grid(method, count):
    intervals = step_intervals(THOUSAND, count, method, change=[1.0] * 1000)
    members = [t for k in range(count) for t in intervals.members(k)]
    assert members == list(THOUSAND)
    assert min(intervals.sizes) >= 1


def test_quadratic_intervals_do_not_shrink_towards_noise():
    sizes = step_intervals(THOUSAND, 10, "quadratic").sizes
    assert list(sizes) == sorted(sizes)
    assert sizes[0] == 9


@given(st.sets(st.integers(0, 999), min_size=3, max_size=12), st.integers(1, 3))
def test_every_group_of_a_sparse_grid_has_a_candidate(grid, spare):
    count = max(len(grid) - spare, 1)
    assert min(step_intervals(tuple(map(float, grid)), count, "quadratic").sizes) >= 1


def test_change_draws_intervals_to_where_the_trajectory_bends():
    change = [100.0 if 300 <= t < 400 else 0.01 for t in range(1000)]
    intervals = step_intervals(THOUSAND, 10, "change", change=change)
    inside = [s for s in intervals.starts if 300 <= intervals.grid[s] <= 400]
    assert len(inside) >= 5


def test_constant_change_gives_uniform_intervals():
    by_change = step_intervals(THOUSAND, 8, "change", change=[2.0] * 1000)
    assert max(by_change.sizes) - min(by_change.sizes) <= 2


def test_a_choice_becomes_a_descending_schedule_and_back():
    intervals = StepIntervals((10.0, 20.0, 30.0, 40.0), (0, 2))
    assert intervals.timesteps((1, 0)) == (30.0, 20.0)
    assert intervals.nearest((38.0, 12.0)) == (0, 1)


def test_more_steps_than_candidates_are_refused():
    with pytest.raises(BudgetError, match="5 steps cannot be chosen from 2"):
        step_intervals((1.0, 2.0), 5)


def test_intervals_by_change_need_the_change():
    with pytest.raises(BudgetError, match="need the change"):
        step_intervals(THOUSAND, 5, "change")
