"""Directions of an input in floating point: exact in full precision, and the same in every state of the layer."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformed_layers import LAYERS

from dq_plugins.errors import PlanError
from dq_plugins.layer_kinds import kind_of
from dq_plugins.plan import ActivationQuant, DynamicActivationQuant, LayerPlan, LowRank, Rotation, Subspace, WeightQuant
from dq_plugins.quantized import layer_transform
from dq_plugins.quantized.exact_tokens import own_weight
from dq_plugins.quantized.input_quantizers import input_quantizer
from dq_plugins.quantized.layer import LayerState, QuantizedLayer, planned_state, simulate_layer, state_of_branch
from dq_plugins.quantized.layer_transform import fake_weight, transform_of
from dq_plugins.quantized.split import Split
from dq_plugins.timesteps import TimestepContext, TimestepGroups

CONTEXT = TimestepContext({"all": TimestepGroups(())})
STATIC = ActivationQuant(3, "all", torch.tensor([0.5]), torch.zeros(1, dtype=torch.int32))


def made(name: str, rank: int, *, balanced: bool = True, rotated: bool = True, branch: bool = True):
    torch.manual_seed(rank)
    layer, shape = LAYERS[name]()
    layer, x = layer.double().requires_grad_(False), torch.randn(shape).double()
    subspace = Subspace(torch.linalg.qr(torch.randn(16, rank)).Q.T.contiguous().half())
    low_rank = LowRank(torch.randn(2, layer.weight[0].numel()).half() / 4, torch.randn(6, 2).half() / 4)
    plan = LayerPlan(
        "",
        balance=torch.rand(16) + 0.5 if balanced else None,
        rotation=Rotation("hadamard", 8) if rotated else None,
        low_rank=low_rank if branch else None,
        subspace=subspace,
        unquantized_reason=None,
    )
    return layer, x, plan


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(list(LAYERS)), rank=st.integers(1, 8), balanced=st.booleans(), rotated=st.booleans(),
    branch=st.booleans(),
)  # fmt: skip
def test_exact_in_full_precision(name, rank, balanced, rotated, branch):
    """To the float16 of what stays in floating point; without that rounding, to 1e-9."""
    layer, x, plan = made(name, rank, balanced=balanced, rotated=rotated, branch=branch)
    expected, kind = layer(x), kind_of(layer)
    for dtype, most in ((torch.float16, 2e-3), (torch.float64, 1e-9)):
        layer_transform.KEPT, before = dtype, layer_transform.KEPT
        try:
            transform = transform_of(plan)
            beside = transform.branch(layer.weight)
            unquantized = input_quantizer(None, CONTEXT, layer, torch.device("cpu"), transform)
            state = state_of_branch(transform, layer.weight, unquantized)
        finally:
            layer_transform.KEPT = before
        rest = transform.weight_restored(layer, transform.of_weight(layer, layer.weight))
        run = QuantizedLayer(layer)

        class Outside(nn.Module):
            def forward(self, x, transform=transform):
                return transform.input_restored(kind, transform.of_input(kind, x))

        run.use(LayerState(rest, Outside(), branch=beside))
        assert float((layer(x) - expected).abs().max()) < most
        assert state[1] != branch  # without a branch of the weight, the directions alone stand beside the input
        for weight in (rest,) if branch else (rest, None):
            run.use(LayerState(weight, unquantized, None, *state))
            assert layer.weight.shape[1] == (32 if branch else 16 + rank)
            assert float((layer(x) - expected).abs().max()) < most
        if not (balanced or rotated):
            assert torch.allclose(own_weight(layer), run.full, atol=2e-3)
        run.remove()
    assert torch.equal(layer(x), expected)


def test_parts_add_up_and_the_rest_has_nothing_of_the_directions():
    split = Split(Subspace(torch.linalg.qr(torch.randn(16, 3)).Q.T.contiguous().half()))
    x = torch.randn(2, 16, 5).double()
    inside, outside = split(x, 1)
    basis = split.basis.double()
    torch.testing.assert_close(outside + torch.einsum("brp,rc->bcp", inside, basis), x, rtol=0, atol=1e-12)
    assert float(torch.einsum("bcp,rc->brp", outside, basis).abs().max()) < 5e-3
    with pytest.raises(PlanError, match="16 channels does not fit the 5"):
        split(x)
    assert [tuple(part.shape) for part in split(x[:0], 1)] == [(0, 3, 5), (0, 16, 5)]
    assert split.half().basis.dtype == torch.float16
    assert split.float().basis.dtype == torch.float16


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channels_stay_where_they_are_in_memory(layout):
    split = Split(Subspace(torch.linalg.qr(torch.randn(16, 3)).Q.T.contiguous().half()))
    x = torch.randn(2, 16, 5, 4).double()
    own, other = split(x.contiguous(memory_format=layout), 1), split(x.contiguous(), 1)
    for part, wanted in zip(own, other, strict=True):
        torch.testing.assert_close(part, wanted, rtol=0, atol=1e-12)
        assert part.is_contiguous(memory_format=layout)  # moving them would take longer than multiplying them
    assert split.inside(x.contiguous(memory_format=layout), 1).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("activation", [STATIC, DynamicActivationQuant(3, symmetric=False)], ids=["static", "dynamic"])
def test_only_the_rest_is_quantized(name, activation):
    layer, x, plan = made(name, 4)
    layer, x = layer.float(), x.float()
    plan.weight, plan.activation = WeightQuant(3, torch.full((6,), 0.1)), activation
    plain, transform, kind = copy.deepcopy(layer), transform_of(plan), kind_of(layer)
    inside, outside = transform.split(x, kind.channel_axis)
    rest = copy.deepcopy(plain)
    rest.weight = nn.Parameter(plan.weight.fake_quantize(transform.of_weight(plain, plain.weight)), requires_grad=False)
    alone = transform_of(LayerPlan("", balance=plan.balance, rotation=plan.rotation))
    values = alone.of_input(kind, outside)
    if isinstance(activation, ActivationQuant):
        quantized = activation.fake_quantize(values, 0)
    else:
        from dq_plugins.quantized.input_quantizers import quantize_dynamically

        quantized = quantize_dynamically(values, activation, kind=kind)
    kept, low_rank = copy.deepcopy(plain), copy.deepcopy(plain)
    kept.weight = nn.Parameter(transform.kept(plain.weight).float(), requires_grad=False)
    low_rank.weight = nn.Parameter(plan.low_rank.weight(plain.weight), requires_grad=False)
    kept.bias = low_rank.bias = None
    if isinstance(kept, nn.Conv1d | nn.Conv2d):
        kept.in_channels = 4
    expected = rest(quantized) + kept(inside) + low_rank(x)
    simulate_layer(layer, plan, CONTEXT)
    with CONTEXT.select(0.0):
        found = layer(x)
    # a tie in rounding may fall either way
    assert float((found - expected).norm() / expected.norm()) < 2e-3


def test_weights_alone_and_one_weight_for_the_input_as_it_comes():
    layer, x, plan = made("linear", 4)
    plan.weight = WeightQuant(3, torch.full((6,), 0.1))
    whole = fake_weight(layer, plan.weight, transform_of(plan))
    expected = nn.functional.linear(x, whole, layer.bias)
    QuantizedLayer(layer).use(planned_state(layer, plan, CONTEXT))
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
