from __future__ import annotations

import pytest
import torch

from dq_plugins.errors import DQError, PlanError
from dq_plugins.plan import DynamicActivationQuant, LayerPlan, WeightQuant


def test_binary_weights_are_scaled_signs_and_zero_is_positive():
    weight = torch.tensor([[0.5, -0.1], [0.0, -3.0]])
    quant = WeightQuant(1, torch.tensor([2.0, 0.25]), scheme="binary")
    assert quant.quantize(weight).tolist() == [[1, -1], [1, -1]]
    assert quant.quantize(weight).dtype == torch.int8
    assert quant.fake_quantize(weight).tolist() == [[2.0, -2.0], [0.25, -0.25]]


def test_affine_weights_of_one_bit_have_the_codes_minus_one_and_zero():
    quant = WeightQuant(1, torch.ones(1))
    assert set(quant.quantize(torch.linspace(-3, 3, 50)[None]).flatten().tolist()) == {-1, 0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 2},
        {"bits": 1, "zero_point": torch.zeros(1, dtype=torch.int32)},
        {"bits": 1, "codes": torch.zeros(1, 1, dtype=torch.int8)},
    ],
)
def test_a_binary_weight_has_nothing_but_signs_and_a_scale(wrong):
    with pytest.raises(PlanError, match="binary weight"):
        WeightQuant(scale=torch.ones(1), scheme="binary", **wrong)


def test_unknown_scheme_is_refused():
    with pytest.raises(PlanError, match="scheme"):
        WeightQuant(4, torch.ones(1), scheme="ternary")


def test_dynamic_ranges_store_nothing_and_are_a_feature_by_name():
    layer = LayerPlan("linear", activation=DynamicActivationQuant(6))
    assert (layer.width, layer.features, layer.dynamic) == ("W32A6 dynamic", ("dynamic_ranges",), True)
    assert repr(layer.activation) == "DynamicActivationQuant(bits=6)"
    assert LayerPlan("linear").features == ()


def test_clipping_is_a_feature_of_its_own_and_belongs_to_a_width():
    clipped = DynamicActivationQuant(4, clip=0.8)
    assert LayerPlan("linear", activation=clipped).features == ("dynamic_ranges", "clipped_ranges")
    assert clipped.at(4) == clipped
    assert clipped.at(8) == DynamicActivationQuant(8)


@pytest.mark.parametrize("clip", [0.0, -1.0, 1.5, float("nan")])
def test_the_share_that_is_kept_is_of_the_extremes(clip):
    with pytest.raises(PlanError, match="clip"):
        DynamicActivationQuant(4, clip=clip)


@pytest.mark.parametrize("bits", [1, 17, "8"])
def test_dynamic_ranges_have_two_bits_or_more(bits):
    with pytest.raises(DQError, match="bits"):
        DynamicActivationQuant(bits)


@pytest.mark.parametrize("kind", ["embedding", "mine"])
def test_dynamic_ranges_are_for_layers_that_multiply(kind):
    with pytest.raises(PlanError, match=f"dynamic ranges are for linear layers and convolutions.*{kind}"):
        LayerPlan(kind, activation=DynamicActivationQuant(8))
    assert LayerPlan("conv2d", activation=DynamicActivationQuant(8)).dynamic
