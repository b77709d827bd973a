from __future__ import annotations

import copy
import itertools

import pytest
import torch
from dq_torchao.lowering import lower_layer
from torch import nn
from torchao_models import GROUPS, layer_plan

from dq_plugins.quantized.layer import simulate_layer
from dq_plugins.timesteps import TimestepContext

WINDOWS = [
    window
    for window in itertools.product((1, 3, (3, 1)), (1, 2), (0, 1, (2, 1), "same"), (1, 2))
    if window[2] != "same" or window[1] == 1  # PyTorch has no "same" padding with strides
]
SCALAR, PER_SAMPLE = torch.tensor(500.0), torch.tensor([100.0, 800.0])


def check(layer: nn.Module, x: torch.Tensor, timestep: torch.Tensor, **options: bool | int) -> None:
    """Integer and simulated execution of ``layer`` agree far below one step of the output."""
    plan, context = layer_plan(layer, **options), TimestepContext({"all": GROUPS})
    integer, simulated = copy.deepcopy(layer), simulate_layer(copy.deepcopy(layer), plan, context)
    assert lower_layer(integer, plan, context).state == "integer"
    with context.select(timestep):
        torch.testing.assert_close(integer(x), simulated(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("timestep", [SCALAR, PER_SAMPLE], ids=["batch", "per-sample"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), WINDOWS)
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_integer_conv_equals_simulation(kernel, stride, padding, dilation, groups, channels_last, timestep):
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, kernel, stride, padding, dilation, groups)
    x = torch.randn(2, 8, 7, 9) * 4
    check(layer, x.to(memory_format=torch.channels_last) if channels_last else x, timestep)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_borders(mode):
    torch.manual_seed(0)
    check(nn.Conv2d(3, 5, 3, padding=(1, 2), padding_mode=mode), torch.randn(2, 3, 6, 7), SCALAR)


@pytest.mark.parametrize("act_bits", [8, 6, 4, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_widths(act_bits, symmetric):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    check(layer, torch.randn(2, 4, 8, 8) * 4, SCALAR, act_bits=act_bits, weight_bits=act_bits, symmetric=symmetric)


def test_one_layer_takes_images_of_any_size():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    plan, context = layer_plan(layer), TimestepContext({"all": GROUPS})
    integer, simulated = copy.deepcopy(layer), simulate_layer(copy.deepcopy(layer), plan, context)
    lower_layer(integer, plan, context)
    with context.select(SCALAR):
        for batch, size in ((1, 8), (2, 8), (2, 5), (1, 1)):
            x = torch.randn(batch, 4, size, size)
            torch.testing.assert_close(integer(x), simulated(x), rtol=1e-5, atol=1e-4)


def test_weights_changed_in_place_are_packed_again():
    torch.manual_seed(0)
    one, other = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
    context = TimestepContext({"all": GROUPS})
    for layer in (one, other):
        lower_layer(layer, layer_plan(layer), context)
    with context.select(SCALAR):
        x = torch.randn(1, 4, 8, 8)
        one(x)
        one.load_state_dict(other.state_dict())
        assert torch.equal(one(x), other(x))
