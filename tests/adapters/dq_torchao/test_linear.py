from __future__ import annotations

import copy
import itertools

import pytest
import torch
from dq_torchao.lowering import lower_layer
from torch import nn
from torchao_models import layer_plan

from dq_plugins.plan import LayerPlan
from dq_plugins.quantized.layer import simulate_layer
from dq_plugins.timesteps import TimestepContext, TimestepGroups

GROUPS = TimestepGroups((300.0, 700.0))


def pair(layer: nn.Module, plan: LayerPlan) -> tuple[nn.Module, nn.Module, TimestepContext]:
    context = TimestepContext({"all": GROUPS})
    integer, simulated = copy.deepcopy(layer), copy.deepcopy(layer)
    assert lower_layer(integer, plan, context).state == "integer"
    return integer, simulate_layer(simulated, plan, context), context


@pytest.mark.parametrize(
    ("act_bits", "weight_bits", "symmetric"), itertools.product((8, 6, 4), (8, 4, 2), (False, True))
)
@pytest.mark.parametrize("timestep", [torch.tensor(500.0), torch.tensor([100.0, 800.0])])
def test_integer_linear_equals_simulation(act_bits, weight_bits, symmetric, timestep):
    torch.manual_seed(0)
    layer = nn.Linear(24, 10, bias=weight_bits != 2)
    plan = layer_plan(layer, act_bits=act_bits, weight_bits=weight_bits, symmetric=symmetric)
    integer, simulated, context = pair(layer, plan)
    with context.select(timestep):
        for shape in ((2, 24), (4, 5, 24), (2, 3, 5, 24)):
            x = torch.randn(shape) * 4
            torch.testing.assert_close(integer(x), simulated(x), rtol=1e-5, atol=1e-4)


def test_tokens_are_quantized_with_the_range_of_their_own_timestep():
    torch.manual_seed(0)
    layer = nn.Linear(24, 10)
    integer, simulated, context = pair(layer, layer_plan(layer))
    timesteps = torch.tensor([[100.0, 500.0, 800.0], [800.0, 800.0, 100.0]])
    x = torch.randn(2, 3, 24) * 4
    with context.select(timesteps):
        y = integer(x)
        torch.testing.assert_close(y, simulated(x), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(integer(x.flatten(0, 1)), y.flatten(0, 1))
        text = torch.randn(2, 7, 24) * 4  # not these tokens: at the largest timestep of its sample
        y_text = integer(text)
        torch.testing.assert_close(y_text, simulated(text), rtol=1e-5, atol=1e-4)
    with context.select(torch.tensor([800.0, 800.0])):
        torch.testing.assert_close(integer(text), y_text)
    for sample, token in itertools.product(range(2), range(3)):
        with context.select(timesteps[sample, token]):
            torch.testing.assert_close(integer(x[sample, token][None])[0], y[sample, token])


def test_one_group_computes_the_same_bits_whatever_the_timesteps():
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 10), torch.randn(2, 3, 24)
    plan = layer_plan(layer)
    assert plan.activation is not None
    plan.activation.scale, plan.activation.zero_point = plan.activation.scale[:1], plan.activation.zero_point[:1]
    integer, simulated, context = pair(layer, plan)
    context.groups["all"] = TimestepGroups()
    for form in (integer, simulated):
        with context.select(500.0):
            y = form(x)
        for timesteps in ([100.0, 800.0], [[100.0, 800.0, 500.0]] * 2):
            with context.select(torch.tensor(timesteps)):
                assert torch.equal(form(x), y)


@pytest.mark.parametrize("timestep", [torch.tensor(500.0), torch.tensor([100.0, 800.0])], ids=["batch", "per-sample"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_dtypes_that_the_kernels_do_not_return(kind, dtype, timestep):
    """oneDNN has no float64 results at all, and float16 ones for linear layers only, without float16 instructions."""
    torch.manual_seed(0)
    layer, shape = (nn.Linear(24, 10), (4, 24)) if kind == "linear" else (nn.Conv2d(8, 10, 3, padding=1), (2, 8, 5, 5))
    layer = layer.to(dtype)
    integer, simulated, context = pair(layer, layer_plan(layer))
    with context.select(timestep):
        x = (torch.randn(shape) * 4).to(dtype)
        y = integer(x)
        assert y.dtype == dtype
        # float64: that the sums are exact, and rescaled in float32, is all that is lost
        tolerance = {"rtol": 0.01, "atol": 0.05} if dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(y, simulated(x), **tolerance)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_another_dtype_keep_it(dtype, x_dtype):
    torch.manual_seed(0)
    layer = nn.Linear(24, 10).to(dtype)
    context = TimestepContext({"all": GROUPS})
    lower_layer(layer, layer_plan(layer), context)
    with context.select(torch.tensor(500.0)):
        x = (torch.randn(4, 24) * 4).to(x_dtype)
        y = layer(x)
        assert y.dtype == x_dtype
        torch.testing.assert_close(y.float(), layer(x.float()), rtol=0.02, atol=0.02)


def test_half_precision_activations_and_cast_layers():
    torch.manual_seed(0)
    layer = nn.Linear(64, 16).bfloat16()
    plan, context = layer_plan(layer), TimestepContext({"all": GROUPS})
    integer = copy.deepcopy(layer)
    lower_layer(integer, plan, context)
    cast = copy.deepcopy(integer).float().bfloat16()
    assert torch.equal(cast.act_scale, integer.act_scale)  # scales do not go through half precision
    with context.select(torch.tensor(500.0)):
        x = torch.randn(3, 64).bfloat16()
        simulated = simulate_layer(layer.float(), plan, context)
        assert integer(x).dtype == torch.bfloat16
        torch.testing.assert_close(integer(x).float(), simulated(x.float()), rtol=0.01, atol=0.05)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_sum_that_int32_may_not_hold_is_not_run_in_integers(bits):
    """All codes at the end of their range: up to the bound the integer sum is right, beyond it is not tried."""
    most = (2**31 - 1) // (255 * 2 ** (bits - 1))
    context = TimestepContext({"all": GROUPS})
    for inputs in (most, most + 1):
        layer = nn.Linear(inputs, 1, bias=False).requires_grad_(False)
        layer.weight.fill_(1.0)
        plan = layer_plan(layer, weight_bits=bits)
        plan.weight.scale.fill_(1 / (2 ** (bits - 1)))
        plan.weight.codes = torch.full_like(layer.weight, -(2 ** (bits - 1)), dtype=torch.int8)
        integer, simulated = copy.deepcopy(layer), simulate_layer(copy.deepcopy(layer), plan, context)
        execution = lower_layer(integer, plan, context)
        with context.select(torch.tensor(500.0)):
            x = torch.full((2, inputs), 1e4)
            torch.testing.assert_close(integer(x), simulated(x), rtol=1e-2, atol=0)  # float32 sums, too
        assert execution.state == ("integer" if inputs == most else "simulated")
    assert execution.reason == f"an output sums {most + 1} products, and int32 is sure to hold {most} of them"
