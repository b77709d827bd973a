from __future__ import annotations

import torch
from brevitas import quant as stock
from dq_brevitas import bake_weights, quantizers
from dq_brevitas.weights import quantized_layers


def test_baked_weights_are_their_own_quantized_values(quantize):
    for weight in (stock.Int8WeightPerChannelFloat, stock.ShiftedUint8WeightPerChannelFloat):
        model = quantize(None, weight, weight_bit_width=3)
        before = {name: layer.quant_weight().value.clone() for name, layer in quantized_layers(model).items()}
        bake_weights(model)
        for name, layer in quantized_layers(model).items():
            assert torch.equal(layer.weight, before[name])
            torch.testing.assert_close(layer.quant_weight().value, before[name], rtol=1e-6, atol=1e-7)
            levels = layer.weight.detach().unique(dim=1) if layer.weight.dim() == 1 else layer.weight[0].unique()
            assert len(levels) <= 8


def test_a_layer_without_weight_quantizer_is_left_alone(quantize):
    model = quantize(quantizers.Int8ActPerTimestepFloat, None)
    before = model.up.weight.clone()
    assert torch.equal(bake_weights(model).up.weight, before)
