from __future__ import annotations

import copy
import json

import dq_torchao
import pytest
import torch
from dq_torchao.fqn import input_ranks, to_fqn_config
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import (
    FqnToConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao_models import Denoiser, denoiser_plan, sqnr

from dq_plugins.plan import LayerPlan, WeightQuant
from dq_plugins.temporal.table import table_section
from dq_plugins.timesteps import TimestepGroups

T = torch.tensor(500.0)


def build() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser().eval().requires_grad_(False)


def sample() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def weight_only(plan, bits=8):
    for layer in plan.layers.values():
        if layer.weight is not None:
            layer.activation, layer.kept = None, "weight only"
    return plan


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_weights_alone_become_torchaos_integer_weights(bits):
    model, ours = build(), build()
    plan = weight_only(denoiser_plan(model, weight_bits=bits))
    lowering = to_fqn_config(plan)
    assert list(lowering.config.fqn_to_config) == ["conv_in", "up", "down", "conv_out"]
    assert not lowering.unexpressed
    kinds = {name: type(config) for name, config in lowering.config.fqn_to_config.items()}
    assert kinds["conv_in"] is IntxWeightOnlyConfig
    assert kinds["up"] is (Int8WeightOnlyConfig if bits == 8 else IntxWeightOnlyConfig)
    quantize_(model, lowering.config, filter_fn=None)
    dq_torchao.apply(ours, plan)
    reference = build()(sample(), T)
    torchaos, of_the_plan = sqnr(reference, model(sample(), T)), sqnr(reference, ours(sample(), T))
    assert abs(torchaos - of_the_plan) < 3  # the same widths; only the scales are torchao's own


def test_it_is_data():
    lowering = to_fqn_config(weight_only(denoiser_plan(build(), weight_bits=4)))
    assert config_from_dict(json.loads(json.dumps(config_to_dict(lowering.config)))) == lowering.config


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_static_range_in_front_of_a_linear_layer(symmetric):
    model, ours = build(), build()
    plan = denoiser_plan(model, TimestepGroups(), symmetric=symmetric)
    plan.layers["conv_in"] = plan.layers["conv_out"] = LayerPlan("conv2d", kept="not compared")
    lowering = to_fqn_config(plan, input_ranks(model, plan, {"sample": sample(), "timestep": T}))
    assert {type(c) for c in lowering.config.fqn_to_config.values()} == {Int8StaticActivationInt8WeightConfig}
    assert list(lowering.config.fqn_to_config) == ["up", "down"]
    quantize_(model, lowering.config, filter_fn=None)
    for name in ("up", "down"):  # torchao's scale of the weight; the range is the plan's
        plan.layers[name].weight.scale = getattr(model, name).weight.scale.flatten().clone()
    dq_torchao.apply(ours, plan)
    torch.testing.assert_close(model(sample(), T), ours(sample(), T), rtol=1e-4, atol=1e-5)


def test_a_table_whose_entries_are_equal_is_one_range():
    plan = denoiser_plan(build())
    activation = plan.layers["up"].activation
    activation.scale, activation.zero_point = activation.scale[:1].expand(3), activation.zero_point[:1].expand(3)
    lowering = to_fqn_config(plan, {"up": 3, "down": 3})
    assert list(lowering.config.fqn_to_config) == ["up"]


def test_what_cannot_be_expressed_is_named_with_the_reason():
    model = build()
    plan = denoiser_plan(model)
    plan.layers["down"] = copy.deepcopy(denoiser_plan(model, TimestepGroups()).layers["down"])
    assert set(to_fqn_config(plan).unexpressed) == {"conv_in", "up", "down", "conv_out"}
    reasons = to_fqn_config(plan).unexpressed
    assert "3 timestep groups" in reasons["up"]
    assert "input_ranks" in reasons["down"]
    assert "no convolution" in reasons["conv_in"]
    assert not to_fqn_config(plan).config.fqn_to_config


def test_roundings_and_widths_that_torchao_does_not_have():
    plan = weight_only(denoiser_plan(build()))
    plan.layers["up"].weight = WeightQuant(8, torch.ones(32), codes=torch.ones(32, 8, dtype=torch.int8))
    plan.layers["down"].weight = WeightQuant(1, torch.ones(8), scheme="binary")
    plan.layers["conv_in"].weight = WeightQuant(12, torch.ones(8))
    plan.layers["conv_out"].kind = "conv3d"
    reasons = to_fqn_config(plan).unexpressed
    assert [word in reasons[name] for name, word in (
        ("up", "learned"), ("down", "binary"), ("conv_in", "has 12"), ("conv_out", "conv3d"),
    )] == [True] * 4  # fmt: skip


def test_widths_below_eight_with_static_inputs_are_not_torchaos():
    plan = denoiser_plan(build(), TimestepGroups(), weight_bits=4)
    assert "W4A8" in to_fqn_config(plan, {"up": 3}).unexpressed["up"]


def test_layers_of_a_temporal_table_are_named():
    plan = weight_only(denoiser_plan(build()))
    plan.layers["time"] = LayerPlan("linear", weight=WeightQuant(8, torch.ones(8)), kept="x")
    plan.sections["temporal-table"] = table_section((1.0,), {"time": torch.ones(1, 8)}, [])
    lowering = to_fqn_config(plan)
    assert "temporal-table" in lowering.unexpressed["time"]
    assert "time" not in lowering.config.fqn_to_config


def test_full_precision_is_left_alone():
    lowering = to_fqn_config(denoiser_plan(build()))
    assert isinstance(lowering.config, FqnToConfig)
    assert "time" not in lowering.unexpressed
