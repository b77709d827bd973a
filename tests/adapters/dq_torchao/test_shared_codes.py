from __future__ import annotations

import copy

import pytest
import torch
from dq_torchao import layer as integer_layer
from dq_torchao.lowering import lower_layer
from torch import nn
from torchao_models import GROUPS, layer_plan

from dq_plugins.timesteps import TimestepContext

CONTEXT = {"all": GROUPS}


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """How many values every quantization of an input had."""
    counts: list[int] = []
    original = integer_layer.activation_codes

    def counted(x, *rest):
        counts.append(x.numel())
        return original(x, *rest)

    monkeypatch.setattr(integer_layer, "activation_codes", counted)
    return counts


def three(context: TimestepContext) -> list[nn.Module]:
    torch.manual_seed(0)
    layers = [nn.Linear(24, 10) for _ in range(3)]
    for layer in layers:
        plan = layer_plan(layer)
        assert lower_layer(layer, plan, context).state == "integer"
    return layers


@torch.no_grad()
def test_query_key_and_value_quantize_once_and_give_the_same_bits(made):
    context = TimestepContext(CONTEXT)
    layers, x = three(context), torch.randn(2, 5, 24)
    alone = []
    for layer in layers:
        with context.select(500.0):
            alone.append(layer(x))
    made.clear()
    with context.select(500.0):
        together = [layer(x) for layer in layers]
    assert len(made) == 1
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("change", ["input", "equal input", "parameters", "timestep"])
def test_what_differs_is_quantized_again(made, change):
    context = TimestepContext(CONTEXT)
    first, second, _ = three(context)
    x, t = torch.randn(2, 5, 24), 500.0
    other, later = x, t
    if change == "parameters":
        second.act_scale.mul_(2)
    if change == "equal input":
        other = x.clone()
    if change == "timestep":
        later = 900.0
    with context.select(t):
        first(x)
        if change == "input":
            x.add_(1)
        if change != "timestep":
            found = second(other)
    if change == "timestep":
        with context.select(later):
            found = second(other)
    assert len(made) == 2
    fresh = copy.deepcopy(second)
    with fresh.context.select(later):
        assert torch.equal(fresh(other), found)


def test_inference_mode_shares_nothing_and_computes_the_same(made):
    context = TimestepContext(CONTEXT)
    layers = three(context)
    with torch.inference_mode(), context.select(500.0):
        x = torch.randn(2, 5, 24)
        together = [layer(x) for layer in layers]
    assert len(made) == 3
    with torch.no_grad(), context.select(500.0):
        assert torch.equal(layers[2](x.clone()), together[2])
