from __future__ import annotations

import json

import pytest
import torch
from dq_torchao import intx_tensor
from dq_torchao.lowering import lower_layer
from torch import nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

from dq_plugins.errors import DQError
from dq_plugins.plan import LayerPlan, Reason, WeightQuant
from dq_plugins.timesteps import TimestepContext


def packed(layer: nn.Module, quant: WeightQuant) -> nn.Module:
    lower_layer(
        layer, LayerPlan("", weight=quant, unquantized_reason=Reason("inputs stay as they are")), TimestepContext({})
    )
    return layer


@pytest.mark.parametrize(
    ("bits", "scheme", "zero_point"),
    [(8, "affine", 0), (4, "affine", 1), (3, "affine", 0), (2, "affine", -1), (1, "affine", 0), (1, "binary", None)],
)
@pytest.mark.parametrize(
    ("build", "shape"), [(lambda: nn.Linear(37, 11), (2, 37)), (lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 5))]
)
def test_torchaos_tensor_computes_the_same(build, shape, bits, scheme, zero_point):
    torch.manual_seed(0)
    layer, plain = build(), build()
    outputs = len(layer.weight)
    zero_points = torch.full((outputs,), zero_point, dtype=torch.int32) if zero_point else None
    packed(layer, WeightQuant(bits, torch.rand(outputs) / 10 + 0.01, zero_points, scheme=scheme))
    plain.weight, plain.bias = nn.Parameter(intx_tensor(layer), requires_grad=False), layer.bias
    x = torch.randn(shape)
    assert torch.equal(plain(x), layer(x))


def test_torchao_can_write_it_to_safetensors():
    layer = packed(nn.Linear(37, 11), WeightQuant(3, torch.full((11,), 0.1)))
    tensors, metadata = flatten_tensor_state_dict({"up.weight": intx_tensor(layer)})
    assert set(tensors) == {"up._weight_qdata", "up._weight_scale", "up._weight_zero_point"}
    assert json.loads(metadata["up.weight"])["_type"] == "IntxUnpackedToInt8Tensor"


def test_zero_points_beyond_int8_are_refused():
    zero_point = torch.full((11,), -128, dtype=torch.int32)
    layer = packed(nn.Linear(37, 11), WeightQuant(8, torch.full((11,), 0.1), zero_point))
    with pytest.raises(DQError, match="beyond 127"):
        intx_tensor(layer)
