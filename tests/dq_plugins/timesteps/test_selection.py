import pytest
import torch

from dq_plugins.errors import TimestepError
from dq_plugins.timesteps import fewest_entries, fit_to_input, select_for_input

TABLE = torch.tensor([1.0, 2.0, 3.0])


def selected(index: list, x: torch.Tensor, table: torch.Tensor = TABLE) -> torch.Tensor:
    return select_for_input(table, torch.tensor(index), x)


def test_one_timestep_selects_one_entry() -> None:
    assert selected([2], torch.zeros(4, 5)).shape == ()
    assert float(selected([2], torch.zeros(4, 5))) == 3


def test_one_group_is_one_entry_whatever_the_timesteps() -> None:
    assert selected([0, 0], torch.zeros(3, 5), TABLE[:1]).shape == ()


def test_samples_select_their_own_and_folded_rows_belong_to_one_sample() -> None:
    assert selected([2, 0], torch.zeros(2, 5)).tolist() == [[3], [1]]
    assert selected([2, 0], torch.zeros(4, 5, 6)).shape == (4, 1, 1)
    assert selected([2, 0], torch.zeros(4, 5)).flatten().tolist() == [3, 3, 1, 1]
    with pytest.raises(TimestepError, match="batch of 3.*2 timesteps"):
        selected([2, 0], torch.zeros(3, 5))


@pytest.mark.parametrize("length", [6, 7])
def test_a_sequence_of_batches_selects_along_the_batch(length: int) -> None:
    assert selected([2, 0], torch.zeros(length, 2, 5)).flatten(1).tolist() == [[3, 1]] * length
    assert selected([2, 0], torch.zeros(2, length, 5)).flatten(1).tolist() == [[3], [1]]


def test_tokens_select_their_own() -> None:
    index = [[0, 1, 2], [2, 2, 0]]
    assert selected(index, torch.zeros(2, 3, 8)).tolist() == [[[1], [2], [3]], [[3], [3], [1]]]
    assert selected(index, torch.zeros(6, 8)).flatten().tolist() == [1, 2, 3, 3, 3, 1]


@pytest.mark.parametrize("shape", [(2, 4, 8), (2, 8), (2, 3, 4, 4)], ids=["text", "pooled", "image"])
def test_rows_that_are_not_the_tokens_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TimestepError, match=r"3 tokens of 2 samples.*one timestep per sample"):
        selected([[0, 1, 2], [2, 2, 0]], torch.zeros(shape))


def test_rows_of_features_keep_their_features() -> None:
    rows = torch.arange(12.0).reshape(2, 3, 2)  # two samples, three tokens, two features
    assert torch.equal(fit_to_input(rows, (2, 3), torch.zeros(2, 3, 9)), rows)
    assert torch.equal(fit_to_input(rows, (2, 3), torch.zeros(6, 9)), rows.reshape(6, 2))


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
