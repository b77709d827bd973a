from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dq_plugins.passes.correction.strength import InputSample, balance_factors, exact_outputs, remaining_error

ONE_GROUP = torch.zeros(1, dtype=torch.int64)


def planted(loud: float, rows: int = 256, channels: int = 16, seed: int = 0) -> tuple[InputSample, torch.Tensor]:
    """Inputs of which one channel is ``loud`` times the others, and a weight that does not know of it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator)
    x[:, 3] *= loud
    weight = torch.randn(1, 8, channels, generator=generator)
    sample = InputSample(x.amin(0)[None], x.amax(0)[None], x[None], torch.zeros(rows, dtype=torch.int64))
    return sample, weight


def factors(sample: InputSample, weight: torch.Tensor, strength: float) -> torch.Tensor:
    inputs = torch.maximum(-sample.low, sample.high).amax(0)
    return balance_factors(inputs, weight.abs().amax((0, 1)), strength)


def error(sample, weight, balance, act_bits=8, weight_bits=8, groups=ONE_GROUP):
    bits = {"act_bits": act_bits, "weight_bits": weight_bits}
    exact = exact_outputs(sample, [weight])
    return remaining_error(sample, [weight], exact, balance, **bits, groups=groups, symmetric=False)


def test_full_strength_makes_the_inputs_even_and_none_the_weights():
    sample, weight = planted(50)
    even = torch.maximum(-sample.low, sample.high).amax(0) / factors(sample, weight, 1.0)
    assert even.max() / even.min() < 1.001
    even = weight.abs().amax((0, 1)) * factors(sample, weight, 0.0)
    assert even.max() / even.min() < 1.001


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8), st.floats(0, 1))
def test_factors_are_positive_finite_and_even_out_to_one(values, strength):
    inputs = torch.tensor(values)
    balance = balance_factors(inputs, inputs.flip(0), strength)
    assert bool((balance > 0).all())
    assert bool(torch.isfinite(balance).all())
    inside = bool(((balance > 1.1e-4) & (balance < 0.9e4)).all())
    assert not inside or float(balance.log().mean()) == pytest.approx(0, abs=1e-3)


def test_a_quiet_channel_counts_with_a_share_of_the_loudest():
    inputs, weights = torch.tensor([100.0, 1.0, 50.0]), torch.ones(3)
    balance = balance_factors(inputs, weights, 1.0, quietest=0.1)
    assert torch.allclose(balance / balance[0], torch.tensor([1.0, 0.1, 0.5]))


def test_an_empty_channel_is_left_alone():
    balance = balance_factors(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([1.0, 0.0, 2.0]), 0.5)
    assert balance[0] == balance[1] == 1


def test_a_loud_channel_makes_balance_pay_and_even_ones_do_not():
    none = torch.ones(16)
    sample, weight = planted(100)
    assert error(sample, weight, factors(sample, weight, 0.5)) < 0.3 * error(sample, weight, none)
    sample, weight = planted(1)
    assert error(sample, weight, factors(sample, weight, 0.5)) > 0.5 * error(sample, weight, none)


def test_nothing_is_lost_where_nothing_is_quantized():
    sample, weight = planted(100)
    assert error(sample, weight, factors(sample, weight, 0.5), act_bits=None, weight_bits=None) < 1e-12


def test_every_group_has_a_range_of_its_own():
    sample, weight = planted(1)
    loud = InputSample(
        torch.cat([sample.low, 50 * sample.low]),
        torch.cat([sample.high, 50 * sample.high]),
        torch.cat([sample.rows, sample.rows], 1),
        torch.tensor([0] * 256 + [1] * 256),
    )
    loud.rows[:, 256:] *= 50
    quiet_rows = InputSample(loud.low, loud.high, sample.rows, sample.timestep)
    own, common = torch.tensor([0, 1]), torch.tensor([0, 0])
    assert error(quiet_rows, weight, torch.ones(16), groups=own) < 0.1 * error(
        quiet_rows, weight, torch.ones(16), groups=common
    )


def test_groups_of_channels_find_their_factors():
    # a grouped convolution: 2 groups of 2 channels, kernels of 3
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 6, generator=generator)
    weight = torch.randn(2, 5, 6, generator=generator)
    sample = InputSample(x.new_full((1, 4), -4), x.new_full((1, 4), 4), x, torch.zeros(64, dtype=torch.int64))
    balance = torch.tensor([0.5, 2.0, 8.0, 0.125])
    assert error(sample, weight, balance, act_bits=None, weight_bits=None) < 1e-12
