from __future__ import annotations

import pytest
import torch
from cross_attention import TOKENS, texts

from dq_plugins.passes.tokens.outliers import TokenStatistics, find_outliers


def seen(*inputs: torch.Tensor) -> TokenStatistics:
    statistics = TokenStatistics()
    for x in inputs:
        statistics.update(x)
    return statistics


def test_the_planted_token_is_found_with_its_vector_and_ratio():
    (found,) = find_outliers(seen(texts(4), texts(3, seed=1)))
    assert found.position == 0
    assert torch.equal(found.vector, texts(1)[0, 0])
    assert found.ratio > 50
    assert found.share == 1


def test_an_ordinary_first_token_is_no_outlier():
    assert find_outliers(seen(texts(8, factor=0.5))) == []


def test_a_large_token_that_changes_is_no_outlier():
    text = texts(8)
    text[:, 0] += torch.arange(8)[:, None]
    assert find_outliers(seen(text)) == []


def test_any_position_may_be_the_outlier():
    text = texts(4).roll(2, dims=1)
    (found,) = find_outliers(seen(text))
    assert found.position == 2


def test_samples_with_another_row_lower_the_share():
    mixed = texts(8)
    mixed[5:, 0] = 0
    (found,) = find_outliers(seen(mixed))
    assert found.share == pytest.approx(5 / 8)
    assert find_outliers(seen(mixed), share=0.7) == []


def test_order_of_samples_does_not_matter():
    mixed = texts(8)
    mixed[:3, 0] = 0
    (one,), (other,) = find_outliers(seen(mixed)), find_outliers(seen(mixed.flip(0)))
    assert torch.equal(one.vector, other.vector)


@pytest.mark.parametrize("x", [torch.zeros(4, 5), torch.zeros(2, 1, 5), torch.zeros(2, TOKENS + 1, 12)])
def test_inputs_that_are_no_sequences_of_one_length_have_no_outliers(x: torch.Tensor):
    assert find_outliers(seen(texts(4), x)) == []
