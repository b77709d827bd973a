from __future__ import annotations

import pytest
import torch
from brevitas import nn as qnn
from brevitas import quant as stock
from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
from brevitas.graph.equalize import activation_equalization_mode
from brevitas.graph.quantize import layerwise_quantize
from dq_brevitas import (
    attach_timesteps,
    bake_weights,
    quantizers,
)
from stock_brevitas import run_gptq
from torch import nn

from dq_plugins.testing.denoiser import TIMESTEPS, TinyDenoiser
from dq_plugins.timesteps import TimestepGroups, context_of

PER_TIMESTEP = TimestepGroups.one_per_timestep(TIMESTEPS)
ACT = quantizers.Int8ActPerTimestepFloat


@pytest.fixture
def model(quantize, calibrate):
    scales = {"weight_scaling_impl_type": "parameter_from_stats"}
    return calibrate(attach_timesteps(quantize(ACT, weight_bit_width=3, **scales), PER_TIMESTEP))


def error(model, calls):
    full = TinyDenoiser()
    with torch.no_grad():
        return float(sum((model(**c) - full(**c)).square().mean() / full(**c).square().mean() for c in calls))


def test_gptq_corrects_where_scales_are_parameters(model, calls):
    before, context = error(model, calls), context_of(model)
    run_gptq(model, calls)
    assert error(model, calls) < 0.8 * before
    assert context_of(model) is context, "routing must survive the mode"


def test_learned_rounding_is_baked(model):
    proxy = model.up.weight_quant
    proxy.quant_injector = proxy.quant_injector.let(
        float_to_int_impl_type="learned_round",
        learned_round_impl_type="hard_sigmoid",
        learned_round_zeta=1.1,
        learned_round_gamma=-0.1,
    )
    proxy.init_tensor_quant(preserve_state_dict=True)
    with torch.no_grad():
        proxy.tensor_quant.int_quant.float_to_int_impl.value.normal_()
    proxy.eval()
    quantized = model.up.quant_weight().value.clone()
    bake_weights(model)
    torch.testing.assert_close(model.up.quant_weight().value, quantized, rtol=1e-6, atol=1e-7)
    assert not any("float_to_int_impl" in key for key in model.state_dict())


def test_bias_correction_composes(quantize, calibrate, calls):
    plain = calibrate(quantize(stock.Int8ActPerTensorFloat, weight_bit_width=4))
    one = calibrate(attach_timesteps(quantize(ACT, weight_bit_width=4), 1))
    grouped = calibrate(attach_timesteps(quantize(ACT, weight_bit_width=4), PER_TIMESTEP))
    for model in (plain, one, grouped):
        with torch.no_grad(), bias_correction_mode(model):
            for call in calls:
                model(**call)
    assert torch.equal(plain.last.bias, one.last.bias)
    assert not torch.equal(grouped.last.bias, TinyDenoiser().last.bias)
    assert not torch.equal(grouped.last.bias, one.last.bias)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, sample, timestep):
        return self.last(self.first(sample).relu() * (timestep / 100).reshape(-1, 1, 1, 1))


def test_equalization_composes(calls):
    calls = [{key: call[key] for key in ("sample", "timestep")} for call in calls]
    full = Small()
    expected = [full(**call) for call in calls]
    with torch.no_grad(), activation_equalization_mode(full, alpha=0.5, layerwise=True, add_mul_node=True):
        for call in calls:
            full(**call)
    assert any("EqualizedModule" in type(module).__name__ for module in full.modules())
    arguments = {"input_quant": ACT, "weight_quant": stock.Int8WeightPerChannelFloat, "bias_quant": None}
    model = layerwise_quantize(full, {nn.Conv2d: (qnn.QuantConv2d, arguments)})
    attach_timesteps(model, PER_TIMESTEP)
    with torch.no_grad(), calibration_mode(model):
        for call in calls:
            model(**call)
    for call, reference in zip(calls, expected, strict=True):
        assert (model.eval()(**call) - reference).square().mean() < 1e-3 * reference.square().mean()
