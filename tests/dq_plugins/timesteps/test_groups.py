import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dq_plugins.errors import TimestepError
from dq_plugins.timesteps import Schedule, TimestepContext, TimestepGroups

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


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32]
)
def test_timesteps_between_at_and_beyond_the_edges_in_every_dtype(dtype) -> None:
    groups = TimestepGroups((0.1, 250.5, 2.0**24 + 1), low=-5.0)
    for edge in groups.edges:
        for near in (
            edge - 0.5,
            math.nextafter(edge, -math.inf),
            edge,
            math.nextafter(edge, math.inf),
            edge + 0.5,
            -5.0,
        ):
            t = torch.tensor(near, dtype=torch.float64).to(dtype)
            if torch.isfinite(t.double()):
                assert int(groups.index(t)) == groups.of(float(t)), (near, dtype)


def test_a_timestep_at_the_end_of_the_range_is_inside_in_float64() -> None:
    low, high = 0.1, 999.1  # which float32 rounds up and down
    context = TimestepContext({"g": TimestepGroups((500.0,), low, high)})
    for t in (low, high):
        context.selection_of(torch.tensor([t], dtype=torch.float64))
