from __future__ import annotations

import itertools

import pytest
import torch

from dq_plugins.errors import PlanError
from dq_plugins.passes.rounding.compensation import (
    GPTQOptions,
    compensated_codes,
    second_moments,
    weighted_quantizer,
)
from dq_plugins.plan import WeightQuant


def correlated(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Inputs of few degrees of freedom and a little noise, as patches of an image are, whose mean is not 0."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(rows, columns // 3, generator=generator)
    mixing = torch.randn(columns // 3, columns, generator=generator)
    return causes @ mixing + 0.3 * torch.randn(rows, columns, generator=generator) + 0.5


def problem(seed: int, outputs: int = 6, columns: int = 24, bits: int = 3):
    weight = torch.randn(outputs, columns, generator=torch.Generator().manual_seed(100 + seed))
    x = correlated(400, columns, seed)
    return weight, x, weighted_quantizer(weight, torch.ones(columns), WeightQuant(bits, torch.ones(1)))


def output_error(weight, codes, quant, x) -> float:
    fake = codes.float() * quant.scale[:, None]
    return float((x @ (weight - fake).T).square().mean())


@pytest.mark.parametrize("seed", range(5))
def test_output_error_is_far_below_that_of_nearest_rounding(seed):
    weight, x, quant = problem(seed)
    nearest = output_error(weight, quant.quantize(weight), quant, x)
    assert output_error(weight, compensated_codes(weight, x, quant), quant, x) < 0.5 * nearest


@pytest.mark.parametrize("seed", range(3))
def test_it_comes_close_to_the_best_codes_there_are(seed):
    # 2 bits, 6 columns: all 4^6 rows of codes can be tried
    weight, x, quant = problem(seed, outputs=3, columns=6, bits=2)
    codes = compensated_codes(weight, x, quant, GPTQOptions(damping=1e-4))
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=6))).float()  # [4096, K]
    best = 0.0
    for row, scale in zip(weight, quant.scale, strict=True):
        best += float(((row - every * scale) @ x.T).square().sum(1).min()) / (3 * len(x))
    found = output_error(weight, codes, quant, x)
    assert found < 1.5 * best
    assert found < 0.9 * output_error(weight, quant.quantize(weight), quant, x)


def test_uncorrelated_inputs_leave_nothing_to_make_up_for():
    weight, _, quant = problem(0)
    rows = torch.diag(torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)) + 0.3)
    assert torch.equal(compensated_codes(weight, rows, quant), quant.quantize(weight))
    assert torch.equal(compensated_codes(weight, rows, quant, GPTQOptions(columns=5)), quant.quantize(weight))


@pytest.mark.parametrize("columns", [1, 12, 24])
@pytest.mark.parametrize("seed", range(3))
def test_parts_are_rounded_as_the_whole(seed, columns):
    weight, x, quant = problem(seed, columns=48)
    whole = compensated_codes(weight, x, quant)
    parts = compensated_codes(weight, x, quant, GPTQOptions(columns=columns))
    assert (parts == whole).float().mean() > 0.99


def test_a_later_part_takes_what_the_codes_before_it_did_to_the_output():
    # both inputs are the same: the second, with finer steps, makes up for all of the first one's error
    x = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    quant = WeightQuant(8, torch.ones(1), group_scale=torch.tensor([[16, 1]], dtype=torch.uint8))
    codes = compensated_codes(torch.tensor([[20.0, 0.0]]), x, quant, GPTQOptions(damping=1e-6, columns=1))
    assert codes.tolist() == [[1, 4]]


def test_an_input_that_is_always_zero_is_rounded_to_nearest():
    weight, x, quant = problem(0)
    x[:, 3] = 0
    codes = compensated_codes(weight, x, quant)
    assert torch.equal(codes[:, 3], quant.quantize(weight)[:, 3])


def test_the_mean_of_the_output_is_kept():
    weight, x, quant = problem(0)
    x = x + 2  # a mean that dominates, as after an activation function

    def shift(codes):
        return float((x @ (weight - codes.float() * quant.scale[:, None]).T).mean(0).abs().mean())

    assert shift(compensated_codes(weight, x, quant)) < 0.4 * shift(quant.quantize(weight))


def test_blocks_of_columns_change_nothing(monkeypatch):
    weight, x, quant = problem(0, columns=40)
    whole = compensated_codes(weight, x, quant)
    monkeypatch.setattr("dq_plugins.passes.rounding.compensation.BLOCK", 7)
    assert (compensated_codes(weight, x, quant) == whole).float().mean() > 0.99


def test_asymmetric_codes_stay_in_their_range():
    weight, x, _ = problem(0)
    form = WeightQuant(3, torch.ones(1), torch.zeros(1, dtype=torch.int32))
    quant = weighted_quantizer(weight + 1, torch.ones(weight.shape[1]), form)
    codes = compensated_codes(weight + 1, x, quant)
    assert int(codes.min()) >= -4
    assert int(codes.max()) <= 3


def test_fewer_rows_than_columns_are_damped():
    weight, x, quant = problem(0)
    few = x[:4]
    codes = compensated_codes(weight, few, quant)
    assert output_error(weight, codes, quant, few) < output_error(weight, quant.quantize(weight), quant, few)


def test_moments_that_are_not_finite_are_an_error():
    weight, x, quant = problem(0)
    with pytest.raises(PlanError, match="NaN or infinity"):
        compensated_codes(weight, x * torch.inf, quant)


def test_scales_weigh_columns_by_their_inputs():
    weight = torch.tensor([[1.0, 0.6, 0.6, 0.6]])
    form = WeightQuant(2, torch.ones(1))
    loud = weighted_quantizer(weight, torch.tensor([1.0, 1e-6, 1e-6, 1e-6]), form)
    quiet = weighted_quantizer(weight, torch.tensor([1e-6, 1.0, 1.0, 1.0]), form)
    assert float(quiet.scale) < float(loud.scale)


def test_second_moments_in_integers_round_as_well_as_exact_ones(monkeypatch):
    weight, x, quant = problem(0, columns=60)
    x[:, 5] *= 1e4  # a loud column costs the others nothing
    x[:, 7] = 0
    exact = (x.double().T @ x.double()).float()
    with_exact = output_error(weight, compensated_codes(weight, x, quant), quant, x)
    monkeypatch.setattr("dq_plugins.passes.rounding.compensation.FEW", 0)
    found = second_moments(x)
    assert not torch.equal(found, exact)
    root = exact.diagonal().clamp(min=1e-30).sqrt()
    assert float(((found - exact) / (root * root[:, None]))[[i for i in range(60) if i != 7]].abs().max()) < 0.01
    assert output_error(weight, compensated_codes(weight, x, quant), quant, x) < 1.05 * with_exact


def test_strips_of_second_moments_hold_the_lower_triangle(monkeypatch):
    _, x, _ = problem(0, columns=60)
    monkeypatch.setattr("dq_plugins.passes.rounding.compensation.FEW", 0)
    whole = second_moments(x)
    monkeypatch.setattr("dq_plugins.passes.rounding.compensation.STRIP", 16)
    found = second_moments(x)
    assert torch.equal(found.tril(), whole.tril())
    assert not found[:16, 16:].any()


def test_outputs_get_the_same_scales_a_few_at_a_time(monkeypatch):
    weight, x, quant = problem(0)
    whole = weighted_quantizer(weight, x.square().sum(0), quant)
    monkeypatch.setattr("dq_plugins.quantized.weight_scale.IN_CACHE", 1)
    assert torch.allclose(weighted_quantizer(weight, x.square().sum(0), quant).scale, whole.scale)
