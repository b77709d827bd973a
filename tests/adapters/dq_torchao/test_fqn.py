from __future__ import annotations

import json
from dataclasses import replace

import dq_torchao
import pytest
import torch
from dq_torchao.fqn import to_fqn_config
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao_models import build, corrected_plan, denoiser_plan, sqnr

from dq_plugins.errors import PlanError
from dq_plugins.plan import DynamicActivationQuant, LayerPlan, Reason, WeightQuant
from dq_plugins.quantized.table_lookup import tabulated
from dq_plugins.timesteps import TimestepGroups

T = torch.tensor(500.0)


class Pointwise(nn.Module):
    """A 1x1 convolution and two linear layers, which torchao can all express; ``sample [B, 4, H, W]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 4)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.conv(sample).flatten(2).transpose(1, 2))))


def pointwise() -> Pointwise:
    torch.manual_seed(0)
    return Pointwise().eval().requires_grad_(False)


def sample() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def weight_only(plan, bits=8):
    for layer in plan.layers.values():
        if layer.weight is not None:
            layer.activation, layer.unquantized_reason = None, Reason("weight only")
    return plan


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_weights_alone_become_torchaos_integer_weights(bits):
    model, ours, full = pointwise(), pointwise(), pointwise()
    plan = weight_only(denoiser_plan(model, weight_bits=bits))
    lowering = to_fqn_config(plan, model)
    assert not lowering.unexpressed
    kinds = {name: type(config) for name, config in lowering.config.fqn_to_config.items()}
    linear = Int8WeightOnlyConfig if bits == 8 else IntxWeightOnlyConfig
    assert kinds == {"conv": IntxWeightOnlyConfig, "up": linear, "down": linear}
    quantize_(model, lowering.config, filter_fn=None)
    dq_torchao.apply(ours, plan)
    errors = [sqnr(full(sample(), T), each(sample(), T)) for each in (model, ours)]
    assert abs(errors[0] - errors[1]) < 5  # the same widths; only the scales are torchao's own


def test_it_is_data():
    model = pointwise()
    lowering = to_fqn_config(weight_only(denoiser_plan(model, weight_bits=4)), model)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(lowering.config)))) == lowering.config


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_static_range_in_front_of_a_linear_layer(symmetric):
    model, ours = pointwise(), pointwise()
    plan = denoiser_plan(model, TimestepGroups(), symmetric=symmetric)
    plan.layers["conv"] = LayerPlan("conv2d", unquantized_reason=Reason("not compared"))
    lowering = to_fqn_config(plan, model, {"sample": sample(), "timestep": T})
    kinds = {name: type(config) for name, config in lowering.config.fqn_to_config.items()}
    assert kinds == dict.fromkeys(("up", "down"), Int8StaticActivationInt8WeightConfig)
    quantize_(model, lowering.config, filter_fn=None)
    for name in ("up", "down"):  # torchao's scale of the weight; the range is the plan's
        plan.layers[name].weight.scale = getattr(model, name).weight.scale.flatten().clone()
    dq_torchao.apply(ours, plan)
    torch.testing.assert_close(model(sample(), T), ours(sample(), T), rtol=1e-4, atol=1e-5)


def test_a_table_whose_entries_are_equal_is_one_range():
    model = pointwise()
    plan = denoiser_plan(model)
    activation = plan.layers["up"].activation
    activation.scale, activation.zero_point = activation.scale[:1].expand(3), activation.zero_point[:1].expand(3)
    lowering = to_fqn_config(plan, model, {"sample": sample(), "timestep": T})
    assert list(lowering.config.fqn_to_config) == ["up"]


def test_what_cannot_be_expressed_is_named_with_the_reason():
    model = build()
    plan = denoiser_plan(model)
    plan.layers["down"] = denoiser_plan(model, TimestepGroups()).layers["down"]
    lowering = to_fqn_config(plan, model)
    reasons = lowering.unexpressed
    assert set(reasons) == {"conv_in", "up", "down", "conv_out"}  # and not the layer that the plan keeps
    assert "3 timestep groups" in reasons["up"]
    assert "example_inputs" in reasons["down"]
    assert "no convolution" in reasons["conv_in"]
    assert isinstance(lowering.config, FqnToConfig)
    assert not lowering.config.fqn_to_config


def test_roundings_widths_and_shapes_that_torchao_does_not_have():
    model = build()
    plan = weight_only(denoiser_plan(model, weight_bits=4))
    plan.layers["up"].weight = WeightQuant(8, torch.ones(32), codes=torch.ones(32, 8, dtype=torch.int8))
    plan.layers["down"].weight = WeightQuant(1, torch.ones(8), scheme="binary")
    plan.layers["conv_in"].weight = WeightQuant(12, torch.ones(8))
    plan.layers["time"] = LayerPlan(
        "linear", weight=WeightQuant(4, torch.ones(8)), unquantized_reason=Reason("weight only")
    )
    reasons = to_fqn_config(plan, model).unexpressed
    words = {"up": "learned", "down": "binary", "conv_in": "has 12", "conv_out": "kernel position", "time": "one input"}
    assert {name: word for name, word in words.items() if word in reasons[name]} == words


def test_widths_below_eight_with_static_inputs_are_not_torchaos():
    model = pointwise()
    plan = denoiser_plan(model, TimestepGroups(), weight_bits=4)
    assert "W4A8" in to_fqn_config(plan, model).unexpressed["up"]


def test_layers_of_a_temporal_table_are_named():
    model = build()
    plan = weight_only(denoiser_plan(model))
    plan.layers["time"] = LayerPlan("linear", weight=WeightQuant(8, torch.ones(8)), unquantized_reason=Reason("x"))
    plan.temporal_table = tabulated((1.0,), {"time": torch.ones(1, 8)}, [])
    lowering = to_fqn_config(plan, model)
    assert "temporal_table" in lowering.unexpressed["time"]
    assert "time" not in lowering.config.fqn_to_config


def test_another_model_is_refused():
    with pytest.raises(PlanError, match="made for"):
        to_fqn_config(denoiser_plan(build()), pointwise())


def test_balanced_channels_and_bias_corrections_cannot_be_said():
    model = build()
    plan = corrected_plan(model)
    plan.layers["up"].balance = None
    plan.layers["down"].bias_correction = None
    left_out = to_fqn_config(plan, model).unexpressed
    assert left_out["conv_in"].startswith("the plan has balance and bias_correction for it")
    assert left_out["up"].startswith("the plan has bias_correction for it")
    assert left_out["down"].startswith("the plan has balance for it")


def test_dynamic_ranges_become_torchaos_own():
    model, ours = pointwise(), pointwise()
    plan = denoiser_plan(model, symmetric=True)
    plan.layers["up"] = replace(plan.layers["up"], activation=DynamicActivationQuant(8))
    plan.layers["down"] = replace(plan.layers["down"], activation=DynamicActivationQuant(8, symmetric=False))
    lowering = to_fqn_config(plan, model)
    config = lowering.config.fqn_to_config["up"]
    assert isinstance(config, Int8DynamicActivationInt8WeightConfig)
    assert type(config_from_dict(json.loads(json.dumps(config_to_dict(config))))) is type(config)
    assert "W8A8 without zero points" in lowering.unexpressed["down"]
    by_group = DynamicActivationQuant(8, True, 1.0, "all", (8, 4, 8), (1.0, 1.0, 1.0))
    for other, why in ((DynamicActivationQuant(8, clip=0.9), "clipping"), (by_group, "dynamic_group_widths")):
        plan.layers["down"].activation = other
        assert why in to_fqn_config(plan, model).unexpressed["down"]
    quantize_(model, lowering.config, filter_fn=None)
    with torch.no_grad():
        x = torch.randn(4, 8)
        dq_torchao.apply(ours, plan)
        assert sqnr(ours.up(x), model.up(x)) > 35  # torchao's weight scales are max / 127.5
