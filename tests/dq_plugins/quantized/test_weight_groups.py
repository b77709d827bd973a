from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dq_plugins.affine import integer_range
from dq_plugins.errors import PlanError
from dq_plugins.plan import Targets, WeightQuant
from dq_plugins.quantized.weight_groups import group_count, group_room, grouped_quantizer
from dq_plugins.quantized.weight_scale import layer_quantizer, weight_quantizer


def uneven(outputs: int = 24, channels: int = 64, kernel: tuple[int, ...] = (), seed: int = 0) -> torch.Tensor:
    """Weights whose input channels differ much in size."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(channels, generator=g))
    return torch.randn(outputs, channels, *kernel, generator=g) * sizes.reshape(-1, *[1] * len(kernel))


def error(quant: WeightQuant, weight: torch.Tensor) -> float:
    return float((quant.fake_quantize(weight) - weight).square().mean() / weight.square().mean())


@settings(deadline=None, max_examples=40)
@given(
    bits=st.integers(1, 6),
    symmetric=st.booleans(),
    groups=st.sampled_from([1, 2, 4, 8]),
    kernel=st.sampled_from([(), (3,), (3, 3)]),
    method=st.sampled_from(["minmax", "shrink"]),
    seed=st.integers(0, 9),
)
def test_every_code_times_its_group_scale_fits_int8(bits, symmetric, groups, kernel, method, seed):
    weight = uneven(5, 32, kernel, seed)
    weight[1], weight[2, :16] = 0, 0
    quant = grouped_quantizer(weight, groups, bits, symmetric=symmetric, method=method)
    assert quant.group_scale.shape == (5, groups)
    assert quant.symmetric == symmetric
    whole = (quant.quantize(weight).int() - quant.zeros(weight)) * quant.stretched(torch.ones(1), weight).int()
    assert -128 <= int(whole.min()) <= int(whole.max()) <= 127
    assert torch.allclose(quant.fake_quantize(weight), whole * quant.scale.reshape(-1, *[1] * (1 + len(kernel))))
    assert not quant.fake_quantize(weight)[1].any()
    if method == "minmax" and bits > 1:  # nothing is cut off: no error is larger than half a step
        widest = 1.01 * quant.steps(weight) * (0.5 if not symmetric or bits > 1 else 1)
        assert bool(((quant.fake_quantize(weight) - weight).abs() <= widest + (0 if symmetric else widest)).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_group_scales_are_nearly_as_good_as_float_ones_and_far_better_than_none(bits, symmetric):
    weight = uneven(64, 256)
    free = weight.reshape(-1, 32)
    floating = error(weight_quantizer(free, bits, symmetric=symmetric), free)
    grouped = error(grouped_quantizer(weight, 8, bits, symmetric=symmetric), weight)
    one = error(weight_quantizer(weight, bits, symmetric=symmetric), weight)
    assert grouped < 1.15 * floating
    assert grouped < 0.75 * one


def test_planted_scales_are_found():
    codes = torch.randint(-7, 8, (6, 32), generator=torch.Generator().manual_seed(0))
    codes[:, ::8] = 7
    scale, group = torch.linspace(0.1, 0.6, 6)[:, None], torch.tensor([[1, 16, 4, 9]]).repeat_interleave(8, 1)
    weight = codes * scale * group
    assert error(grouped_quantizer(weight, 4, 4), weight) < 1e-12


def test_importance_decides_between_groups_of_errors():
    weight, important = uneven(8, 64), torch.ones(64)
    important[::4] = 100

    def weighted(quant: WeightQuant) -> float:
        return float(((quant.fake_quantize(weight) - weight).square() * important).sum())

    told = grouped_quantizer(weight, 2, 2, power=2.0, importance=important)
    assert weighted(told) < weighted(grouped_quantizer(weight, 2, 2, power=2.0))


def test_where_there_are_groups():
    assert group_room(4, symmetric=False) == 8
    assert group_count(128, 32, 4) == 4
    assert group_count(128, 32, 8) == group_count(128, None, 4) == group_count(4, 64, 4) == 1
    assert group_count(128, 16, 6, symmetric=False) == 1


@pytest.mark.parametrize(
    ("layer", "groups"),
    [
        (nn.Linear(64, 6), 4),
        (nn.Conv2d(64, 6, 3), 4),
        (nn.Conv2d(64, 6, 3, groups=2), 2),
        (nn.ConvTranspose2d(64, 6, 3), None),
        (nn.Embedding(64, 64), None),
    ],
)
def test_layers_that_multiply_get_them(layer, groups):
    quant = layer_quantizer(layer, 4, Targets(4, 8, weight_group_size=16))
    assert (None if quant.group_scale is None else quant.group_scale.shape[1]) == groups


@pytest.mark.parametrize(
    ("group_scale", "message"),
    [
        (torch.ones(3, dtype=torch.uint8), r"uint8 \[outputs, groups\]"),
        (torch.ones(3, 2), r"uint8 \[outputs, groups\]"),
        (torch.ones(2, 2, dtype=torch.uint8), "for 3 outputs"),
        (torch.zeros(3, 2, dtype=torch.uint8), "at least 1, found 0"),
    ],
)
def test_impossible_group_scales_are_refused(group_scale, message):
    with pytest.raises(PlanError, match=message):
        WeightQuant(4, torch.ones(3), group_scale=group_scale)


def test_a_group_has_at_least_eight_channels():
    with pytest.raises(PlanError, match="weight_group_size is at least 8"):
        Targets(weight_group_size=4)


def test_learned_codes_keep_their_groups():
    weight = uneven(4, 32)
    quant = grouped_quantizer(weight, 4, 3)
    quant.codes = torch.full((4, 32), integer_range(3)[0], dtype=torch.int8)
    assert torch.equal(quant.fake_quantize(weight), -4 * quant.steps(weight))
