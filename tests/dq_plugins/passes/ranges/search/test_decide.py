import pytest
import torch

from dq_plugins.observers.error import ErrorTable
from dq_plugins.passes.ranges.search.decide import (
    as_runs,
    decided,
    group_error,
    labels_from_starts,
    learned_groups,
    merged,
)

SURE = 0.97


def weights_for(labels: list[int], groups: int) -> torch.Tensor:
    rest = (1 - SURE) / (groups - 1)
    return torch.where(torch.nn.functional.one_hot(torch.tensor(labels), groups) > 0, SURE, rest)


def test_empty_groups_are_gone_and_numbers_follow_the_timesteps() -> None:
    assert decided(weights_for([5, 5, 2, 2, 7], 8), contiguous=True).tolist() == [0, 0, 1, 1, 2]
    assert decided(weights_for([5, 2, 5, 2, 7], 8), contiguous=False).tolist() == [0, 1, 0, 1, 2]


def test_runs_overrule_a_stray_timestep_when_there_are_no_groups_to_spare() -> None:
    stray = weights_for([0, 0, 1, 0, 1, 1, 1], 2)
    stray[2] = torch.tensor([0.45, 0.55])
    assert decided(stray, contiguous=True).tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert decided(stray, contiguous=False).tolist() == [0, 0, 1, 0, 1, 1, 1]


def table(best: list[int], candidates: int = 3) -> ErrorTable:
    """Every timestep has one good candidate; the others cost 1."""
    error = 1.0 - torch.nn.functional.one_hot(torch.tensor(best), candidates).double()
    bounds = torch.arange(1.0, candidates + 1)
    return ErrorTable(-bounds, bounds, error + 0.01, 1.0)


def test_groups_that_want_the_same_range_are_joined_and_others_are_not() -> None:
    tables = {"a": table([0, 0, 0, 0, 1, 1, 2, 2])}
    joined = merged(torch.tensor([0, 0, 1, 2, 3, 3, 4, 5]), tables, 0.01)
    assert joined.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert group_error(joined, tables) == pytest.approx(0.01)


def test_a_tolerance_joins_what_costs_no_more() -> None:
    tables = {"a": table([0, 0, 0, 0, 0, 0, 0, 1])}
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1])
    assert merged(labels, tables, 1.0).tolist() == labels.tolist()  # 0.01 would become 0.135
    assert merged(labels, tables, 20.0).tolist() == [0] * 8


def test_runs_of_one_label_share_their_row() -> None:
    groups, rows = as_runs(torch.tensor([0, 0, 1, 0]), (10.0, 20.0, 30.0, 50.0), (0.0, 60.0))
    assert groups.edges == (25.0, 40.0)
    assert rows == (0, 1, 0)


def test_labels_of_runs() -> None:
    assert labels_from_starts((2, 5), 6).tolist() == [0, 0, 1, 1, 1, 2]
    assert labels_from_starts((), 3).tolist() == [0, 0, 0]


def test_decided_groups_go_on_with_the_learned_group_they_came_from() -> None:
    weights = weights_for([5, 5, 2, 2, 7], 8)
    assert learned_groups(decided(weights, contiguous=True), weights).tolist() == [5, 2, 7]
    assert learned_groups(torch.tensor([0, 0, 0, 0, 1]), weights_for([5, 5, 2, 2, 2], 8)).tolist() in ([5, 2], [2, 2])
    assert learned_groups(torch.tensor([0, 0, 0, 1, 1]), weights_for([5, 5, 2, 2, 2], 8)).tolist() == [5, 2]
