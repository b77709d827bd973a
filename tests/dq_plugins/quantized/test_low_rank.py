"""A low-rank branch beside a quantized layer: exact in full precision, and the same in every state of the layer."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformed_layers import LAYERS

from dq_plugins.errors import PlanError
from dq_plugins.layer_kinds import kind_of
from dq_plugins.plan import ActivationQuant, LayerPlan, LowRank, Rotation, WeightQuant
from dq_plugins.quantized.layer import LayerState, QuantizedLayer, planned_state, simulate_layer
from dq_plugins.quantized.layer_transform import fake_weight, transform_of
from dq_plugins.timesteps import TimestepContext, TimestepGroups

CONTEXT = TimestepContext({"all": TimestepGroups(())})


def made(
    name: str, rank: int, balanced: bool = True, rotated: bool = True, bits: int = 16
) -> tuple[nn.Module, torch.Tensor, LayerPlan]:
    torch.manual_seed(rank)
    layer, shape = LAYERS[name]()
    layer, x = layer.double().requires_grad_(False), torch.randn(shape).double()
    low_rank = LowRank(torch.randn(rank, layer.weight[0].numel()).half() / 4, torch.randn(6, rank).half() / 4)
    low_rank = low_rank.in_8_bits() if bits == 8 else low_rank
    balance, rotation = torch.rand(16) + 0.5 if balanced else None, Rotation("hadamard", 8) if rotated else None
    plan = LayerPlan("", balance=balance, rotation=rotation, low_rank=low_rank, unquantized_reason=None)
    return layer, x, plan


def outputs(layer: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    other = copy.deepcopy(layer)
    other.weight = nn.Parameter(weight, requires_grad=False)
    return other(x)


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(list(LAYERS)), rank=st.integers(1, 5), balanced=st.booleans(), rotated=st.booleans(),
    bits=st.sampled_from([8, 16]),
)  # fmt: skip
def test_exact_in_full_precision(name, rank, balanced, rotated, bits):
    layer, x, plan = made(name, rank, balanced, rotated, bits)
    expected, transform = layer(x), transform_of(plan)
    branch = transform.branch(layer.weight)
    rest = transform.weight_restored(layer, transform.of_weight(layer, layer.weight))
    run = QuantizedLayer(layer)
    run.use(LayerState(rest, nn.Identity(), branch=branch))
    assert layer.weight.shape[1] == 32
    assert float((layer(x) - expected).abs().max()) < 1e-9
    run.use(LayerState(None, nn.Identity(), branch=branch))
    assert float((layer(x) - expected).abs().max()) < 1e-9
    run.use(LayerState(rest, None, branch=branch))
    assert float((layer(x) - expected).abs().max()) < 1e-9
    run.remove()
    assert torch.equal(layer(x), expected)
    assert not hasattr(layer, "input_beside")


@pytest.mark.parametrize("name", LAYERS)
def test_the_branch_meets_the_input_as_it_comes(name):
    layer, x, plan = made(name, 3)
    plan.weight = WeightQuant(3, torch.full((6,), 0.1))
    plan.activation = ActivationQuant(3, "all", torch.tensor([0.5]), torch.zeros(1, dtype=torch.int32))
    plain, transform, kind = copy.deepcopy(layer), transform_of(plan), kind_of(layer)
    weight = plan.weight.fake_quantize(transform.of_weight(plain, plain.weight))
    restored = transform.weight_restored(plain, weight)
    quantized = transform.input_restored(kind, plan.activation.fake_quantize(transform.of_input(kind, x), 0))
    bias = plain.bias if plain.bias is not None else 0
    unbiased = copy.deepcopy(plain)
    unbiased.bias = None
    expected = outputs(plain, restored, quantized) + outputs(unbiased, transform.branch(plain.weight), x)
    simulate_layer(layer, plan, CONTEXT)
    with CONTEXT.select(0.0):
        torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    whole = fake_weight(plain, plan.weight, transform)
    torch.testing.assert_close(whole, restored + transform.branch(plain.weight))
    assert bias is not None


def test_weights_alone_hold_it_inside():
    layer, x, plan = made("linear", 2)
    plan.weight = WeightQuant(3, torch.full((6,), 0.1))
    expected = F.linear(x, fake_weight(layer, plan.weight, transform_of(plan)), layer.bias)
    state = planned_state(layer, plan, CONTEXT)
    QuantizedLayer(layer).use(state)
    torch.testing.assert_close(layer(x), expected)


def test_gradients_reach_the_weight_that_is_learned():
    layer, x, plan = made("linear", 2)
    branch = transform_of(plan).branch(layer.weight)
    rest = layer.weight.detach().clone().requires_grad_(True)
    QuantizedLayer(layer).use(LayerState(rest, nn.Identity(), branch=branch))
    layer(x).sum().backward()
    torch.testing.assert_close(rest.grad, x.sum((0, 1)).expand(6, 16))


@pytest.mark.parametrize(
    ("down", "up", "message"),
    [
        (torch.zeros(2, 5).half(), torch.zeros(4, 3).half(), r"\[rank, inputs\]"),
        (torch.zeros(2, 5), torch.zeros(4, 2), "float16"),
        (torch.full((2, 5), torch.inf).half(), torch.zeros(4, 2).half(), "NaN or infinity"),
    ],
)
def test_impossible_branches_are_refused(down, up, message):
    with pytest.raises(PlanError, match=message):
        LowRank(down, up)


def test_a_branch_of_another_layer_is_told():
    with pytest.raises(PlanError, match=r"for a weight \(4, 5\), and the layer's is \(4, 6\)"):
        LowRank(torch.zeros(2, 5).half(), torch.zeros(4, 2).half()).weight(torch.zeros(4, 6))


def test_codes_of_8_bits_are_those_of_each_direction():
    """Directions of very different size lose alike: to nearest, at most half a step of 127 in both matrices."""
    torch.manual_seed(0)
    down, up = torch.randn(3, 20) * torch.tensor([[1.0], [1e-2], [0.0]]), torch.randn(7, 3)
    whole = LowRank(down.half(), up.half())
    small = whole.in_8_bits()
    assert (small.down.dtype, small.up.dtype, small.nbytes) == (torch.int8, torch.int8, 3 * 20 + 7 * 3 + 3 * 4)
    like = torch.zeros(7, 20)
    for rank in (1, 2, 3):
        parts = [each.truncated(rank).weight(like) for each in (whole, small)]
        assert float((parts[0] - parts[1]).norm() / parts[0].norm()) < 0.01
    second = [each.weight(like) - each.truncated(1).weight(like) for each in (whole, small)]
    assert float((second[0] - second[1]).norm() / second[0].norm()) < 0.01


def test_codes_come_with_a_scale_and_nothing_else_does():
    codes = LowRank(torch.randn(2, 8).half(), torch.randn(4, 2).half()).in_8_bits()
    for parts, message in (
        ((codes.down, codes.up), "float16"),
        ((codes.down.half(), codes.up.half(), codes.scale), "int8 beside a scale"),
        ((codes.down, codes.up, codes.scale[:1]), "scale of a low-rank branch must have the shape"),
        ((codes.down, codes.up, -codes.scale), "scale of a low-rank branch must be positive"),
    ):
        with pytest.raises(PlanError, match=message):
            LowRank(*parts)
