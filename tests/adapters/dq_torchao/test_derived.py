from __future__ import annotations

import pytest
import torch
from dq_torchao.packed_weight import PackedWeight, pack_layer
from torch import nn

from dq_plugins.errors import DQError
from dq_plugins.plan import WeightQuant


def packed() -> PackedWeight:
    torch.manual_seed(0)
    return pack_layer(nn.Linear(6, 3), WeightQuant(4, torch.full((3,), 0.1)))


def test_merging_into_a_packed_weight_is_refused():
    layer = packed()
    with pytest.raises(DQError, match="nothing can be merged"):
        layer.weight.data += torch.ones(3, 6)
    with pytest.raises(DQError, match="nothing can be merged"):
        layer.weight.data = torch.ones(3, 6)


def test_reading_it_gives_plain_tensors():
    layer = packed()
    assert type(layer.weight.data) is torch.Tensor
    assert type(layer.weight + 1) is torch.Tensor
    assert type(layer(torch.randn(2, 6))) is torch.Tensor
    assert isinstance(layer.weight, torch.Tensor)
    assert torch.equal(layer.weight.clone(), layer.weight)


def test_a_compiled_layer_is_the_same():
    layer = packed().requires_grad_(False)
    x = torch.randn(2, 6)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_the_input_of_a_packed_layer_gets_its_gradient():
    layer, x = packed(), torch.randn(2, 6, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 6))
