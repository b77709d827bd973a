import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dq_plugins.errors import TimestepError
from dq_plugins.timesteps import Schedule, TimestepGroups

EDGES = st.lists(st.integers(1, 998), unique=True, max_size=8).map(lambda e: tuple(float(v) for v in sorted(e)))


@given(EDGES, st.integers(0, 999))
def test_tensor_index_equals_counting_edges(edges: tuple[float, ...], t: int) -> None:
    groups = TimestepGroups(edges)
    assert int(groups.index(torch.tensor(t))) == groups.of(t) == sum(e <= t for e in edges)


@given(st.lists(st.integers(0, 999), unique=True, min_size=1, max_size=30))
def test_one_per_timestep_gives_each_its_own_group(timesteps: list[int]) -> None:
    groups = TimestepGroups.one_per_timestep(timesteps)
    assert [groups.of(t) for t in sorted(timesteps)] == list(range(len(timesteps)))


def test_index_keeps_the_shape() -> None:
    assert TimestepGroups((5.0,)).index(torch.tensor([1, 9])).tolist() == [0, 1]


@pytest.mark.parametrize("edges", [(2.0, 1.0), (1.0, 1.0), (float("nan"),), (float("inf"),)])
def test_edges_must_ascend_and_be_finite(edges: tuple[float, ...]) -> None:
    with pytest.raises(TimestepError):
        TimestepGroups(edges)


def test_bounds_are_inclusive() -> None:
    groups = TimestepGroups((5.0,), low=1, high=9)
    assert (groups.of(1), groups.of(9)) == (0, 1)
    with pytest.raises(TimestepError, match=r"9\.5 lies outside \[1, 9\]"):
        groups.of(9.5)


def test_schedule_of_a_scheduler_keeps_the_order() -> None:
    class Scheduler:
        timesteps = torch.tensor([900, 500, 100])

    assert Schedule.of(Scheduler()).timesteps == (900.0, 500.0, 100.0)


@pytest.mark.parametrize("bad", [(), (1.0, float("nan"))])
def test_schedule_refuses_nothing_and_nan(bad: tuple[float, ...]) -> None:
    with pytest.raises(TimestepError):
        Schedule(bad)
