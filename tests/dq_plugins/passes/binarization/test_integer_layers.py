from __future__ import annotations

import pytest
import torch
from torch import nn

from dq_plugins.passes.binarization.finish import to_integer
from dq_plugins.passes.binarization.integer_layers import IntegerConv, IntegerWeight
from dq_plugins.quantized.trained_layers import LayerChoice, train_quantized


def power_of_two_scales(model):
    """Scales and steps that float32 sums exactly, so that simulated and integer results must be equal."""
    for name, parameter in model.named_parameters():
        if name.endswith(("scale", "step")):
            parameter.data = torch.exp2(torch.log2(parameter.data.abs()).round())
        elif name.endswith("bias"):
            parameter.data = (parameter.data * 8).round() / 8


LAYERS = {
    "linear": (lambda: nn.Linear(40, 24), (3, 5, 40)),
    "linear without bias": (lambda: nn.Linear(8, 8, bias=False), (6, 8)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 3, padding=1), (2, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 10, 3, padding=1), (2, 6, 7, 5)),
    "strided": (lambda: nn.Conv2d(6, 10, (3, 2), stride=2, padding=(1, 0)), (2, 6, 8, 9)),
    "dilated": (lambda: nn.Conv2d(4, 5, 3, dilation=2, padding="same"), (1, 4, 9, 9)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), (2, 8, 6, 6)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (1, 3, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("weight", "bits", "kernel"), [("binary", 8, "int8"), ("binary", 4, "bit-serial"), ("int8", 8, "auto")]
)
def test_integer_execution_equals_fake_quantization(kind, weight, bits, kernel):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model = nn.Sequential(make())
    x = torch.randn(shape)
    train_quantized(model, {"0": LayerChoice(weight, bits)})
    model(x)
    power_of_two_scales(model)
    expected = model(x).detach()
    assert torch.equal(to_integer(model, kernel)(x), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_with_float_activations_the_weights_are_the_trained_ones(kind):
    make, shape = LAYERS[kind]
    model = nn.Sequential(make())
    x = torch.randn(shape)
    train_quantized(model, {"0": LayerChoice("binary", None)})
    expected = model(x).detach()
    torch.testing.assert_close(to_integer(model)(x), expected)


def test_learned_scales_of_any_value_agree_to_float_rounding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 16, 1))
    x = torch.randn(2, 16, 8, 8)
    train_quantized(model, {"0": LayerChoice("binary", 8), "2": LayerChoice("int8", 8)})
    expected = model(x).detach()
    found = to_integer(model)(x)
    assert (found - expected).square().mean() < 1e-8 * expected.square().mean()


def test_a_binary_weight_is_stored_in_one_bit():
    weight = IntegerWeight(torch.ones(64, 32, 3, 3, dtype=torch.int8), torch.ones(64), binary=True)
    assert weight.data.numel() == 64 * 32 * 9 // 8
    assert weight.data.dtype == torch.uint8


def test_state_dict_holds_packed_weights_and_reloads():
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    x = torch.randn(1, 3, 6, 6)
    train_quantized(model, {"0": LayerChoice("binary", 8)})
    model(x)
    to_integer(model)
    assert isinstance(model[0], IntegerConv)
    assert {k: v.dtype for k, v in model.state_dict().items()}["0.weight.data"] == torch.uint8
    other = nn.Sequential(nn.Conv2d(3, 8, 3))
    train_quantized(other, {"0": LayerChoice("binary", 8)})
    other(x)
    to_integer(other).load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
