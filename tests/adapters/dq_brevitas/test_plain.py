from __future__ import annotations

import pytest
import torch
from brevitas import nn as qnn
from brevitas import quant as stock
from dq_brevitas import BrevitasAdapter, attach_timesteps, float_model, quantizers
from torch import nn

from dq_plugins.errors import DQError
from dq_plugins.hashing import weights_hash
from dq_plugins.quantized.table_lookup import tabulated
from dq_plugins.testing.denoiser import TIMESTEPS, TinyDenoiser
from dq_plugins.testing.plans import handmade_plan
from dq_plugins.timesteps import context_of


def test_it_is_the_denoiser_that_was_quantized(quantize, calibrate, calls):
    model = calibrate(attach_timesteps(quantize(quantizers.Int8ActPerTimestepFloat), 4))
    plain = float_model(model)
    assert weights_hash(plain) == weights_hash(TinyDenoiser())
    assert {type(m).__module__ for m in plain.modules()} <= {
        "torch.nn.modules.linear",
        "torch.nn.modules.conv",
        plain.__module__,
    }
    assert context_of(plain) is None
    assert all(torch.equal(plain(**call), TinyDenoiser()(**call)) for call in calls)
    assert context_of(model) is not None, "the model itself is not changed"


def test_it_carries_what_was_trained(quantize, calibrate, calls):
    model = calibrate(attach_timesteps(quantize(quantizers.Int8ActPerTimestepFloat), 4)).train()
    model(**calls[0]).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert torch.equal(float_model(model).up.weight, model.up.weight)
    assert not torch.equal(float_model(model).up.weight, TinyDenoiser().up.weight)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (qnn.QuantConv1d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), (2, 4, 9)),
        (qnn.QuantConv2d(4, 6, (3, 1), dilation=2, padding=(1, 0), padding_mode="reflect", bias=True), (2, 4, 9, 9)),
        (qnn.QuantConvTranspose2d(4, 6, 3, stride=2, output_padding=1, bias=True), (2, 4, 5, 5)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_every_argument_of_a_layer_survives(layer, shape):
    layer.weight_quant.disable_quant = True
    plain = float_model(nn.Sequential(layer))
    x = torch.randn(shape)
    assert type(plain[0]).__module__ == "torch.nn.modules.conv"
    torch.testing.assert_close(plain(x), layer(x))


def test_a_quantizer_between_layers_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), qnn.QuantIdentity(act_quant=stock.Int8ActPerTensorFloat))
    with pytest.raises(DQError, match=r"'1.act_quant'"):
        float_model(model)


def test_layers_that_a_temporal_table_replaced_come_from_the_original():
    plan = handmade_plan(TinyDenoiser())
    rows = {"modulation": torch.randn(5, 16)}
    plan.temporal_table = tabulated(tuple(map(float, sorted(TIMESTEPS))), rows, ["time_out"])
    model = BrevitasAdapter().apply(TinyDenoiser(), plan)
    with pytest.raises(DQError, match="original="):
        float_model(model)
    assert weights_hash(float_model(model, TinyDenoiser())) == plan.model_hash
