import pytest
import torch

from dq_plugins.errors import TimestepError
from dq_plugins.timesteps import (
    RowOrder,
    by_sample_or_token,
    fewest_entries,
    fit_to_input,
    select_for_input,
    unpacked,
)

TABLE = torch.tensor([1.0, 2.0, 3.0])


def selected(
    index: list, x: torch.Tensor, table: torch.Tensor = TABLE, rows: RowOrder | None = "first"
) -> torch.Tensor:
    return select_for_input(table, torch.tensor(index), x, rows=rows)


def test_one_timestep_selects_one_entry() -> None:
    assert selected([2], torch.zeros(4, 5)).shape == ()
    assert float(selected([2], torch.zeros(4, 5))) == 3


def test_one_group_is_one_entry_whatever_the_timesteps() -> None:
    assert selected([0, 0], torch.zeros(3, 5), TABLE[:1]).shape == ()


def test_samples_select_their_own_and_folded_rows_belong_to_one_sample() -> None:
    assert selected([2, 0], torch.zeros(2, 5)).tolist() == [[3], [1]]
    assert selected([2, 0], torch.zeros(4, 5, 6)).shape == (4, 1, 1)
    assert selected([2, 0], torch.zeros(4, 5)).flatten().tolist() == [3, 3, 1, 1]
    with pytest.raises(TimestepError, match=r"shape \(3, 5\), 2 timesteps"):
        selected([2, 0], torch.zeros(3, 5))


@pytest.mark.parametrize("length", [6, 7])
def test_a_sequence_of_batches_selects_along_the_batch(length: int) -> None:
    found = selected([2, 0], torch.zeros(length, 2, 5), rows="second")
    assert found.flatten(1).tolist() == [[3, 1]] * length
    assert selected([2, 0], torch.zeros(2, length, 5)).flatten(1).tolist() == [[3], [1]]


def test_samples_that_lie_fastest_select_their_own() -> None:
    assert selected([2, 0], torch.zeros(6, 5), rows="fastest").flatten().tolist() == [3, 1] * 3
    assert selected([2, 0], torch.zeros(2, 2, 5), rows="second").squeeze(-1).tolist() == [[3, 1], [3, 1]]


@pytest.mark.parametrize("shape", [(4, 5), (2, 2, 5), (4, 2, 5), (3, 5)])
def test_where_the_shape_leaves_it_open_whose_rows_they_are_different_timesteps_are_an_error(shape) -> None:
    for rows in (None, "mixed"):
        with pytest.raises(TimestepError, match="one timestep for the whole batch"):
            selected([2, 0], torch.zeros(shape), rows=rows)
        assert selected([2, 2], torch.zeros(shape), rows=rows).unique().tolist() == [3]


@pytest.mark.parametrize("rows", [None, "mixed"])
def test_packed_tokens_of_one_sample_need_no_order_nor_their_values(rows, monkeypatch) -> None:
    monkeypatch.setattr("dq_plugins.timesteps.selection._readable", lambda index: False)  # as in a compiled graph
    for shape in [(3, 8), (1, 3, 8), (2, 3, 8), (3, 1, 8)]:
        found = selected([[0, 2, 1]], torch.zeros(shape), rows=rows)
        assert found.squeeze(-1).reshape(-1, 3).unique(dim=0).tolist() == [[1, 3, 2]]


@pytest.mark.parametrize("rows", [None, "mixed"])
def test_where_either_dimension_may_have_the_tokens_an_order_is_needed(rows) -> None:
    packed, twice, thrice = ([[0, 2, 1]] * n for n in (1, 2, 3))
    refused = [(packed, (3, 3, 8)), (packed, (3, 2, 8)), (thrice, (3, 3, 8)), (twice, (6, 8))]
    refused += [(twice, (2, 3, 8)), (twice, (3, 2, 8))] if rows else []
    for index, shape in refused:
        with pytest.raises(TimestepError, match="one timestep for the whole batch"):
            selected(index, torch.zeros(shape), rows=rows)
    first, second = ([[1, 3, 2]] * 3, [[1] * 3, [3] * 3, [2] * 3])
    for index in (packed, thrice):
        assert selected(index, torch.zeros(3, 3, 8), rows="first").squeeze(-1).tolist() == first
        assert selected(index, torch.zeros(3, 3, 8), rows="second").squeeze(-1).tolist() == second


@pytest.mark.parametrize("shape", [(3, 8), (5, 8), (4, 5, 8), (4, 5, 6, 7)])
def test_rows_of_no_order_that_are_no_tokens_are_at_the_largest_timestep_of_all(shape) -> None:
    assert selected([[0, 2, 1]] * 2, torch.zeros(shape), rows=None).unique().tolist() == [3]


def test_shapes_that_leave_nothing_open_need_no_order() -> None:
    assert selected([2, 0], torch.zeros(2, 5), rows=None).flatten().tolist() == [3, 1]
    assert selected([2, 0], torch.zeros(2, 4, 5), rows=None).flatten().tolist() == [3, 1]
    assert selected([2, 0], torch.zeros(3, 2, 5), rows=None).flatten(1).tolist() == [[3, 1]] * 3
    tokens = [[0, 1, 2], [0, 1, 2]]
    assert selected(tokens, torch.zeros(2, 3, 5), rows=None).squeeze(-1).tolist() == [[1, 2, 3]] * 2
    assert selected(tokens, torch.zeros(6, 2, 5), rows=None).squeeze(-1).t().tolist() == [[1, 1, 2, 2, 3, 3]] * 2


def test_tokens_select_their_own() -> None:
    index = [[0, 1, 2], [2, 2, 0]]
    assert selected(index, torch.zeros(2, 3, 8)).tolist() == [[[1], [2], [3]], [[3], [3], [1]]]
    second = selected(index, torch.zeros(3, 2, 8), rows="second")
    assert second.squeeze(-1).t().tolist() == [[1, 2, 3], [3, 3, 1]]
    assert selected(index, torch.zeros(6, 8), rows="fastest").flatten().tolist() == [1, 3, 2, 3, 3, 1]
    assert selected(index, torch.zeros(6, 8)).flatten().tolist() == [1, 2, 3, 3, 3, 1]


def test_tokens_of_a_frame_share_its_timestep() -> None:
    index = [[0, 1], [2, 2]]
    assert selected(index, torch.zeros(2, 6, 8)).flatten(1).tolist() == [[1, 1, 1, 2, 2, 2], [3] * 6]
    assert selected(index, torch.zeros(4, 8, 3, 3)).flatten().tolist() == [1, 2, 3, 3]
    assert selected(index, torch.zeros(8, 5, 8)).flatten().tolist() == [1, 1, 2, 2, 3, 3, 3, 3]


@pytest.mark.parametrize("shape", [(2, 4, 8), (2, 8), (2, 3, 4, 4)], ids=["text", "pooled", "image"])
def test_rows_that_are_not_the_tokens_are_at_the_largest_timestep_of_their_sample(shape: tuple[int, ...]) -> None:
    found = selected([[0, 1, 0], [2, 2, 0]], torch.zeros(shape))
    assert found.flatten().tolist() == [2, 3]
    assert found.dim() == len(shape)


def test_channels_are_no_tokens() -> None:
    index = torch.tensor([[0, 1, 0], [2, 2, 0]])
    assert fit_to_input(index, torch.zeros(2, 3, 8), spatial=1).tolist() == [1, 2]
    assert fit_to_input(index[:, 0], torch.zeros(4, 2, 8), spatial=1, rows="first").tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((), (1,)), ((1,), (1,)), ((2,), (2,)), ((2, 1), (2,)), ((2, 5), (2, 5)), ((2, 1, 5, 1, 1), (2, 5))],
)
def test_timesteps_of_any_shape(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert by_sample_or_token(torch.zeros(shape)).shape == expected


@pytest.mark.parametrize(
    ("values", "fewest"),
    [
        ([7], [7]),
        ([7, 7], [7]),
        ([7, 8], [7, 8]),
        ([[7, 7], [8, 8]], [7, 8]),
        ([[7, 7], [7, 7]], [7]),
        ([[7, 8], [7, 8]], [[7, 8], [7, 8]]),
        ([[7]], [7]),
    ],
)
def test_equal_values_are_one(values: list, fewest: list) -> None:
    assert fewest_entries(torch.tensor(values)).tolist() == fewest


def test_packed_tokens_have_the_timestep_that_they_point_at() -> None:
    index = unpacked(torch.tensor([2, 0]), torch.tensor([1, 0, 0]))
    assert index.tolist() == [[0, 2, 2]]
    assert fit_to_input(index, torch.zeros(2, 3, 8)).tolist() == [[0, 2, 2], [0, 2, 2]]
    assert fit_to_input(index, torch.zeros(2, 4, 8)).tolist() == [2, 2]
    assert unpacked(torch.tensor([2, 0]), None).tolist() == [2, 0]
