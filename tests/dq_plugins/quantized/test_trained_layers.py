from __future__ import annotations

import copy

import pytest
import torch
from binary_models import tiny_denoiser, tiny_inputs
from torch import nn

from dq_plugins.errors import DQError
from dq_plugins.hashing import weights_hash
from dq_plugins.passes.binarization import LayerChoice, train_quantized, trained_layers
from dq_plugins.quantized.trained_layers import make_plain


def test_layers_keep_identity_parameters_and_keys():
    model = nn.Sequential(nn.Linear(4, 4))
    layer, weight = model[0], model[0].weight
    train_quantized(model, {"0": LayerChoice("evolvable", 4)})
    assert model[0] is layer
    assert model[0].weight is weight
    assert isinstance(model[0], nn.Linear)
    assert {"0.weight", "0.bias", "0.weight_quantizer.scale", "0.input_quantizer.step"} <= set(model.state_dict())


def test_weights_in_the_forward_have_as_many_values_as_bits_allow():
    model = tiny_denoiser()
    choices = {
        "first": LayerChoice("int8"),
        "middle.conv1": LayerChoice("binary"),
        "middle.conv2": LayerChoice("evolvable"),
    }
    train_quantized(model, choices)
    per_channel = {
        n: layer.quantized_weight().flatten(1)[0].unique().numel() for n, layer in trained_layers(model).items()
    }
    assert per_channel["middle.conv1"] == 2
    assert per_channel["middle.conv2"] == 4
    assert per_channel["first"] > 20


def test_a_layer_without_activation_bits_sees_its_input():
    model = nn.Sequential(nn.Linear(4, 4))
    train_quantized(model, {"0": LayerChoice("binary", None)})
    x = torch.randn(3, 4)
    expected = x @ model[0].quantized_weight().t() + model[0].bias
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(("name", "found"), [("nope", "no such layer"), ("down", "ModuleList"), ("up.0", "Block")])
def test_what_cannot_train_is_refused_and_nothing_is_changed(name, found):
    model = tiny_denoiser()
    with pytest.raises(DQError, match=found):
        train_quantized(model, {"first": LayerChoice("int8"), name: LayerChoice("binary")})
    assert not trained_layers(model)


@pytest.mark.parametrize("wrong", [{"weight": "ternary"}, {"weight": "binary", "act_bits": 1}])
def test_wrong_choices_are_refused(wrong):
    with pytest.raises(DQError):
        LayerChoice(**wrong)


def test_every_parameter_gets_a_gradient_and_copies_are_independent():
    model = tiny_denoiser()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    train_quantized(model, {n: LayerChoice("evolvable", 4) for n in names})
    copied = copy.deepcopy(model)
    model(**tiny_inputs()).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in copied.parameters())


def test_the_latent_weights_keep_their_hash_and_come_back():
    model = tiny_denoiser()
    inputs = tiny_inputs()
    before, output = weights_hash(model), model(**inputs)
    train_quantized(model, {"middle.conv1": LayerChoice("binary"), "embed": LayerChoice("int8")})
    assert weights_hash(model) == before
    for layer in trained_layers(model).values():
        make_plain(layer)
    assert torch.equal(model(**inputs), output)
    assert type(model.embed) is nn.Linear


def test_compiled_training_graph_is_whole_and_survives_the_transition():
    from dq_plugins.passes.binarization import evolve

    model = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
    train_quantized(model, {"0": LayerChoice("evolvable"), "2": LayerChoice("binary", 4)})
    x = torch.randn(4, 8)
    model(x)  # sets the steps
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    evolve(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        after = compiled(x)
    torch.testing.assert_close(after, model(x))
