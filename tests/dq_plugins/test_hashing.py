from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from dq_plugins.errors import DQError
from dq_plugins.hashing import hash_json, hash_tensor, hash_tensors, weights_hash

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn]


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def test_json_hash_ignores_key_order_and_sees_values():
    assert hash_json({"a": 1, "b": [1, 2]}) == hash_json({"b": (1, 2), "a": 1})
    assert hash_json({"a": 1}) != hash_json({"a": 2})


@pytest.mark.parametrize("data", [float("nan"), {1, 2}, float("inf")])
def test_json_hash_refuses_what_json_cannot_hold(data):
    with pytest.raises(DQError, match="JSON"):
        hash_json(data)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensor_hash_sees_values_for_every_dtype(dtype):
    zeros, ones = torch.zeros(3).to(dtype), torch.ones(3).to(dtype)
    assert hash_tensor(zeros) == hash_tensor(zeros.clone()) != hash_tensor(ones)


def test_tensor_hash_sees_dtype_and_shape_and_not_strides():
    x = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert hash_tensor(x) == hash_tensor(x.to(memory_format=torch.channels_last))
    assert len({hash_tensor(x), hash_tensor(x.reshape(2, 12)), hash_tensor(x.int())}) == 3
    assert hash_tensor(torch.tensor(1.0)) != hash_tensor(torch.tensor([1.0]))
    assert hash_tensor(torch.zeros(0)) != hash_tensor(torch.zeros(0, 3))


def test_tensors_hash_ignores_order_and_sees_names():
    a, b = torch.ones(2), torch.zeros(2)
    assert hash_tensors({"a": a, "b": b}) == hash_tensors({"b": b, "a": a})
    assert hash_tensors({"a": a, "b": b}) != hash_tensors({"a": b, "b": a})


def test_weights_hash_changes_with_one_weight_only():
    module, reference = small(), weights_hash(small())
    assert weights_hash(copy.deepcopy(module)) == reference
    module.eval().requires_grad_(False)
    module.register_buffer("scratch", torch.ones(1), persistent=False)
    module.register_forward_hook(lambda *_: None)
    assert weights_hash(module) == reference
    module[0].weight[0, 0, 0, 0] += 1e-6
    assert weights_hash(module) != reference


def test_weights_hash_is_that_of_the_module_inside_a_compiled_one():
    module = small()
    assert weights_hash(torch.compile(module)) == weights_hash(module)


def test_weights_hash_leaves_quantizer_state_out():
    class Quantizer(nn.Module):
        dq_quantizer_state = True

        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(4))
            self.child = nn.Linear(2, 2)

    module, reference = small(), weights_hash(small())
    module[0].input_quantizer = Quantizer()
    assert weights_hash(module) == reference


def test_weights_hash_of_meta_weights_says_so():
    with pytest.raises(DQError, match=r"'0\.bias'.*meta"):
        weights_hash(small().to("meta"))


def test_weights_hash_is_the_same_in_another_process():
    code = (
        "import torch; from torch import nn; from dq_plugins.hashing import weights_hash;"
        "torch.manual_seed(0);"
        "print(weights_hash(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == weights_hash(small())
