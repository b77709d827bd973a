from __future__ import annotations

import copy

import pytest
import torch
from binary_models import tiny_denoiser, tiny_inputs
from torch import nn

pytest.importorskip("brevitas")
from brevitas.graph.calibrate import calibration_mode
from brevitas.graph.quantize import layerwise_quantize
from brevitas.nn import QuantConv2d, QuantIdentity, QuantLinear
from dq_brevitas import binary_layer_map, freeze_binary
from dq_brevitas.quantizers import EvolvableBasisWeight, Int8ActLearnedStep, SignedBinaryWeightPerChannelFloat
from dq_brevitas.reading import read_activation, read_weight

import dq_plugins.graph as graph
from dq_plugins.affine import fake_quantize
from dq_plugins.errors import DQError
from dq_plugins.passes.binarization import (
    BinaryDMCallback,
    LayerChoice,
    binarydm_choices,
    evolvable_bases,
    evolve,
    train_quantized,
)
from dq_plugins.quantized.straight_through import sign


@pytest.fixture(scope="module")
def choices():
    return binarydm_choices(graph.partition(tiny_denoiser(), tiny_inputs()), 4)


def binary_model(choices):
    model = layerwise_quantize(tiny_denoiser(), compute_layer_map=binary_layer_map(choices.layers))
    model.train()
    return model


def test_layer_map_gives_the_same_network_as_the_core(choices):
    reference = train_quantized(tiny_denoiser(), {n: c for n, c in choices.layers.items() if c.binary})
    model = binary_model(choices)
    model.first.weight_quant.disable_quant = model.last.weight_quant.disable_quant = True
    for name in ("first", "last", "embed"):
        model.get_submodule(name).input_quant.disable_quant = True
        model.get_submodule(name).weight_quant.disable_quant = True
    torch.testing.assert_close(model(**tiny_inputs()), reference(**tiny_inputs()), atol=2e-6, rtol=0)
    assert len(evolvable_bases(model)) == len(evolvable_bases(reference)) == 12


@pytest.mark.parametrize("weight", [SignedBinaryWeightPerChannelFloat, EvolvableBasisWeight])
def test_stock_layers_take_the_quantizers(weight):
    layer = QuantConv2d(3, 4, 3, weight_quant=weight, input_quant=Int8ActLearnedStep, bias_quant=None)
    layer.train()
    layer(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_after_the_transition_the_weight_is_scaled_signs_bit_for_bit():
    layer = QuantLinear(6, 4, bias=False, weight_quant=EvolvableBasisWeight)
    assert layer.quant_weight().value[0].unique().numel() == 4
    evolve(layer)
    expected = layer.weight_quant.tensor_quant.binarizer.scale[:, None] * sign(layer.weight)
    assert torch.equal(layer.quant_weight().value, expected)


def test_options_reach_the_binarizer():
    injector = EvolvableBasisWeight.let(scale_gradient="printed")
    layer = QuantLinear(6, 4, bias=False, weight_quant=injector, weight_binarizer_clip=0.5)
    binarizer = layer.weight_quant.tensor_quant.binarizer
    assert (binarizer.scale_gradient, binarizer.clip) == ("printed", 0.5)


def test_the_callback_trains_a_brevitas_model_through_the_transition(choices):
    teacher = tiny_denoiser()
    model = binary_model(choices)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    callback = BinaryDMCallback(model, teacher, blocks=choices.blocks, evolve_at=2, ema_decay=0.9)
    for i in range(4):
        inputs = tiny_inputs(seed=i)
        with torch.no_grad():
            target = teacher(**inputs)
        loss = callback.step((model(**inputs) - target).square().mean())
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        callback.on_step(i)
    assert callback.evolved
    assert float(callback.parts["mimicking"].detach()) > 0


def test_state_dict_round_trip_with_the_stage(choices):
    model = binary_model(choices)
    model(**tiny_inputs())
    evolve(model)
    with torch.no_grad():
        model.middle.conv1.weight_quant.tensor_quant.binarizer.scale.mul_(1.5)
    other = binary_model(choices)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(**tiny_inputs()), model(**tiny_inputs()))
    assert torch.equal(copy.deepcopy(model)(**tiny_inputs()), model(**tiny_inputs()))


def test_frozen_model_has_stock_quantizers_and_the_same_output(choices):
    model = binary_model(choices)
    expected = model(**tiny_inputs())
    evolve(model)
    with torch.no_grad():
        model.middle.conv1.weight_quant.tensor_quant.binarizer.scale[:2] *= -1
    expected = model(**tiny_inputs())
    freeze_binary(model)
    assert torch.equal(model(**tiny_inputs()), expected)
    for name, choice in choices.layers.items():
        weight = model.get_submodule(name).quant_weight()
        assert type(model.get_submodule(name).weight_quant.tensor_quant).__module__.startswith("brevitas.")
        if choice.binary:
            assert set(weight.int().unique().tolist()) == {-1, 1}
    reloaded = freeze_binary_of(choices)
    reloaded.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(reloaded(**tiny_inputs()), expected)


def freeze_binary_of(choices):
    model = binary_model(choices)
    model(**tiny_inputs())
    evolve(model)
    return freeze_binary(model)


def test_two_bases_and_plain_models_cannot_be_frozen(choices):
    with pytest.raises(DQError, match="two bases"):
        freeze_binary(binary_model(choices))
    with pytest.raises(DQError, match="no binary weight"):
        freeze_binary(tiny_denoiser())


def test_a_frozen_layer_exports():
    pytest.importorskip("onnx")
    from dq_brevitas import inference_mode

    layer = QuantConv2d(3, 4, 3, weight_quant=EvolvableBasisWeight, input_quant=Int8ActLearnedStep, bias_quant=None)
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(layer)
    model.train()
    model(x)
    evolve(model)
    freeze_binary(model).eval()
    with torch.no_grad(), inference_mode(model):
        expected = model(x)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), expected)


def test_a_plan_reads_binary_weights_off_the_model(choices):
    model = binary_model(choices)
    model(**tiny_inputs())
    evolve(model)
    layer = model.middle.conv1
    weight = read_weight("middle.conv1", layer)
    assert (weight.scheme, weight.bits) == ("binary", 1)
    assert torch.equal(weight.fake_quantize(layer.weight.detach()), layer.quant_weight().value.detach())
    activation = read_activation("middle.conv1", layer.input_quant)
    assert activation.bits == 4
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(activation.fake_quantize(x, 0), layer.input_quant(x).detach())


@pytest.mark.parametrize("bits", [4, 8])
def test_learned_step_has_the_value_and_gradient_of_lsq(bits):
    from dq_plugins.passes.binarization import LearnedStepActivation

    x = torch.randn(4, 50)
    ours, stock = LearnedStepActivation(bits), QuantIdentity(act_quant=Int8ActLearnedStep, bit_width=bits)
    stock.train()
    upstream = torch.randn(4, 50)
    results = [module(x) for module in (ours, stock)]
    for y in results:
        (y * upstream).sum().backward()
    scaling = stock.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl
    assert torch.equal(*results)
    assert torch.equal(results[0], fake_quantize(x, ours.scale(), 0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    torch.testing.assert_close(scaling.step.grad, ours.step.grad)


def test_calibration_mode_averages_over_its_batches():
    act = QuantIdentity(act_quant=Int8ActLearnedStep)
    with torch.no_grad(), calibration_mode(act):
        for size in (1.0, 2.0, 6.0):
            act(size * torch.ones(10))
    scaling = act.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl
    torch.testing.assert_close(scaling.step.detach(), torch.tensor(2 * 3.0 / 127**0.5))
    act.train()
    act(100 * torch.ones(10))
    torch.testing.assert_close(scaling.step.detach(), torch.tensor(2 * 3.0 / 127**0.5))


def test_a_step_that_was_never_set_has_no_scale():
    act = QuantIdentity(act_quant=Int8ActLearnedStep, return_quant_tensor=True)
    with pytest.raises(DQError, match="never set"):
        act.act_quant.scale()


def test_layers_without_a_choice_stay_unquantized():
    model = layerwise_quantize(tiny_denoiser(), compute_layer_map=binary_layer_map({"first": LayerChoice("int8")}))
    assert not model.last.weight_quant.is_quant_enabled
    assert not model.last.input_quant.is_quant_enabled
    assert isinstance(model.last, nn.Conv2d)
