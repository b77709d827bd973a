from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_plugins.errors import DQError
from dq_plugins.observers.error import ErrorTable
from dq_plugins.observers.grouping import (
    best_candidates,
    optimal_groups,
    uniform_groups,
)


def table(error: torch.Tensor, power: float = 1.0) -> ErrorTable:
    high = torch.linspace(1, 2, error.shape[1])
    return ErrorTable(-high, high, error, power)


def random_tables(seed: int, steps: int, layers: int = 3, candidates: int = 6) -> dict[str, ErrorTable]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layer{i}": table(torch.rand(steps, candidates, generator=generator).double(), power=1.0 + i)
        for i in range(layers)
    }


def brute_force(tables: dict[str, ErrorTable], groups: int) -> float:
    steps = next(iter(tables.values())).error.shape[0]
    best = float("inf")
    for starts in combinations(range(1, steps), groups - 1):
        ends = [0, *starts, steps]
        cost = 0.0
        for t in tables.values():
            parts = [float(t.error[a:b].sum(0).min()) for a, b in pairwise(ends)]
            cost += sum(parts) / t.power / steps
        best = min(best, cost)
    return best


@pytest.mark.parametrize("seed", range(5))
def test_optimal_among_all_contiguous_partitions(seed):
    tables = random_tables(seed, steps=7)
    grouping = optimal_groups(tables, range(7))
    for groups in range(1, 8):
        assert grouping.curve[groups - 1] == pytest.approx(brute_force(tables, groups), rel=1e-12)
        assert sum(grouping.errors(groups).values()) == pytest.approx(grouping.curve[groups - 1], rel=1e-7)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 4))
def test_curve_never_rises_and_no_layer_is_worse_than_static(seed, steps, layers):
    tables = random_tables(seed, steps, layers)
    grouping = optimal_groups(tables, range(steps))
    curve = torch.tensor(grouping.curve)
    assert bool((curve[1:] <= curve[:-1] * (1 + 1e-12)).all())
    static = grouping.errors(1)
    for groups in range(1, steps + 1):
        assert all(error <= static[layer] for layer, error in grouping.errors(groups).items())


def test_the_ends_of_the_curve_are_the_static_and_the_per_timestep_optimum():
    tables = random_tables(3, steps=9)
    grouping = optimal_groups(tables, range(9))
    static = sum(float(t.error.sum(0).min()) / t.power / 9 for t in tables.values())
    each = sum(float(t.error.min(1).values.sum()) / t.power / 9 for t in tables.values())
    assert grouping.curve[0] == pytest.approx(static, rel=1e-12)
    assert grouping.curve[-1] == pytest.approx(each, rel=1e-12)


def planted() -> ErrorTable:
    """Timesteps 0-2, 3-4 and 5-9 each have a candidate of their own."""
    best = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
    return table(1 - 0.9 * torch.nn.functional.one_hot(best, 3).double())


def test_planted_groups_are_found_with_edges_halfway():
    timesteps = [0, 10, 20, 40, 50, 100, 110, 120, 130, 140]
    grouping = optimal_groups({"layer": planted()}, timesteps, bounds=(-10, 150))
    groups = grouping.groups(3)
    assert groups.edges == (30.0, 75.0)
    assert (groups.low, groups.high) == (-10, 150)
    low, high = grouping.ranges(3)["layer"]
    assert torch.equal(high, planted().high)
    assert torch.equal(low, -high)


def test_groups_beyond_the_number_of_timesteps_are_one_each():
    grouping = optimal_groups(random_tables(0, 4), [1, 2, 3, 4])
    assert len(grouping.groups(99)) == 4
    assert grouping.errors(99) == grouping.errors(4)


def test_a_layer_that_does_not_change_keeps_one_range():
    constant = table(torch.rand(1, 5, generator=torch.Generator().manual_seed(0)).double().expand(10, 5))
    low, _ = optimal_groups({"moves": planted(), "constant": constant}, range(10)).ranges(3)["constant"]
    assert len(set(low.tolist())) == 1


def test_layers_count_relative_to_their_power_unless_weighted():
    other = table(planted().error.flip(0) * 100, power=100.0)
    alike = optimal_groups({"a": planted(), "b": other}, range(10))
    assert alike.curve[0] == pytest.approx(2 * optimal_groups({"a": planted()}, range(10)).curve[0])
    only_a = optimal_groups({"a": planted(), "b": other}, range(10), weights={"a": 1.0, "b": 0.0})
    assert only_a.groups(3).edges == (2.5, 4.5)


def test_edges_per_layer_are_at_least_as_good_for_each():
    tables = {"a": planted(), "b": table(planted().error.flip(0))}
    shared = optimal_groups(tables, range(10))
    own = {layer: optimal_groups({layer: errors}, range(10)) for layer, errors in tables.items()}
    assert own["a"].groups(3).edges != own["b"].groups(3).edges
    for layer in tables:
        assert own[layer].errors(3)[layer] <= shared.errors(3)[layer]


def test_best_candidates_for_groups_of_others():
    membership = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3, 3])
    static = int(planted().error.sum(0).argmin())
    assert best_candidates(planted(), membership, 4).tolist() == [0, 1, static, 2]


def test_equal_candidates_leave_the_static_one_in_place():
    error = torch.tensor([[1.0, 1.0], [1.0, 0.5]], dtype=torch.float64)
    assert best_candidates(table(error), torch.tensor([0, 1]), 2).tolist() == [1, 1]


def test_uniform_groups_hold_equally_many_timesteps():
    groups = uniform_groups(range(0, 100, 10), 5)
    counts = torch.bincount(groups.index(torch.arange(0, 100, 10)))
    assert counts.tolist() == [2, 2, 2, 2, 2]
    assert len(uniform_groups([1, 2, 3], 8)) == 3


def test_bad_input_is_refused():
    with pytest.raises(DQError, match="at least one layer"):
        optimal_groups({}, [1])
    with pytest.raises(DQError, match="'layer0' has 4 timesteps, expected 5"):
        optimal_groups(random_tables(0, 4), range(5))
    with pytest.raises(DQError, match="at least one timestep group"):
        optimal_groups(random_tables(0, 4), range(4)).groups(0)
    with pytest.raises(DQError, match="at least one group"):
        uniform_groups([1], 0)
