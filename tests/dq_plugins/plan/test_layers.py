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


def test_clipping_is_a_feature_of_its_own():
    clipped = DynamicActivationQuant(4, clip=0.8)
    assert LayerPlan("linear", activation=clipped).features == ("dynamic_ranges", "clipped_ranges")


def test_dynamic_ranges_have_a_width_and_a_share_of_their_own_in_each_group():
    forms = [DynamicActivationQuant(4, clip=0.8), DynamicActivationQuant(8), DynamicActivationQuant(3, clip=0.6)]
    quant = DynamicActivationQuant(4).in_groups("steps", forms)
    assert quant == DynamicActivationQuant(8, True, 1.0, "steps", (4, 8, 3), (0.8, 1.0, 0.6))
    assert (quant.forms, quant.narrowest) == (tuple(forms), 3)
    features = ("dynamic_ranges", "clipped_ranges", "dynamic_group_widths")
    assert LayerPlan("linear", activation=quant).features == features
    assert quant.in_groups("steps", [forms[0]] * 3) == forms[0]  # all alike need no groups


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"groups": "steps", "group_bits": (4, 8)}, "together"),
        ({"group_bits": (4, 8), "group_clips": (1.0, 1.0)}, "together"),
        ({"groups": "steps", "group_bits": (4, 6), "group_clips": (1.0, 1.0)}, "largest of them bits=8"),
        ({"groups": "steps", "group_bits": (4, 8), "group_clips": (1.0,)}, "1 group_clips of 2 groups"),
        ({"groups": "steps", "group_bits": (4, 8), "group_clips": (1.0, 1.0), "clip": 0.9}, "clip of its own"),
        ({"groups": "steps", "group_bits": (4, 8), "group_clips": (1.0, 2.0)}, "share of the extremes"),
    ],
)
def test_forms_by_group_fit_together(form, message):
    with pytest.raises(PlanError, match=message):
        DynamicActivationQuant(8, **form)


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
