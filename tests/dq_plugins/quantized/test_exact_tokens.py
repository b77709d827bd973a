from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cross_attention import FEATURES, texts
from torch import nn
from torch.nn import functional as F

from dq_plugins.affine import affine_parameters, fake_quantize, integer_range
from dq_plugins.hashing import weights_hash
from dq_plugins.quantized.exact_tokens import ExactTokens, exact_tokens


def coarse(layer: nn.Module, args: tuple) -> tuple:
    """A per-tensor 8-bit quantizer whose range is that of ordinary tokens."""
    low, high = texts(8)[:, 1:].aminmax()
    scale, zero = affine_parameters(low, high, 8, symmetric=False)
    return (fake_quantize(args[0], scale, zero, *integer_range(8)),)


def setting(bias: bool = True, quantized: bool = True) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    full = nn.Linear(FEATURES, 5, bias=bias).requires_grad_(False)
    layer = copy.deepcopy(full)
    if quantized:
        layer.register_forward_pre_hook(coarse)
    row = texts(1)[0, :1]
    exact_tokens(layer, ExactTokens((0,), row, full(row)))
    return full, layer


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_known_rows_are_exact_and_the_others_quantized_at_any_batch_size(batch: int, bias: bool):
    full, layer = setting(bias)
    x = texts(batch, seed=batch)
    y = layer(x)
    assert torch.equal(y[:, 0], full(texts(1)[0, :1]).expand(batch, -1))
    assert torch.equal(y[:, 1:], full(coarse(layer, (x,))[0])[:, 1:])


def test_other_rows_are_computed_live_sample_by_sample():
    full, layer = setting()
    x = texts(3)
    x[1, 0] = 0  # a zeroed negative prompt
    x[2, 0] *= 1.1  # a weighted prompt
    y = layer(x)
    assert torch.equal(y[0, 0], full(x[0, 0]))
    assert torch.allclose(y[1:, 0], full(x[1:, 0]), rtol=1e-5)


def test_live_rows_use_the_weight_that_the_backend_names():
    full, layer = setting()
    layer.exact_tokens.weight_of = double
    x = torch.zeros(1, 2, FEATURES)
    x[0, 0] = 1.0
    assert torch.allclose(layer(x)[0, 0], F.linear(x[0, 0], 2 * full.weight, full.bias), rtol=1e-5)


def double(layer: nn.Module) -> torch.Tensor:
    return 2 * layer.weight


def test_inputs_without_a_token_axis_pass_through():
    full, layer = setting()
    x = torch.randn(4, FEATURES)
    assert torch.equal(layer(x), full(coarse(layer, (x,))[0]))


def test_copies_and_pickles_carry_their_rows():
    _, layer = setting()
    x = texts(2)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x))
        assert copied.exact_tokens is not layer.exact_tokens


def test_rows_are_no_weights_of_the_denoiser():
    full, layer = setting()
    assert weights_hash(layer) == weights_hash(full)


def test_removing_restores_the_layer():
    torch.manual_seed(0)
    layer = nn.Linear(FEATURES, 5).requires_grad_(False)
    x, before = texts(2), layer(texts(2))
    installed = exact_tokens(layer, ExactTokens((0,), texts(1)[0, :1], torch.full((1, 5), 7.0)))
    assert torch.equal(layer(x)[:, 0], torch.full((2, 5), 7.0))
    installed.close()
    assert torch.equal(layer(x), before)
    assert not hasattr(layer, "exact_tokens")


def test_one_graph_serves_known_and_other_rows():
    full, layer = setting(quantized=False)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    known, other = texts(2), texts(2)
    other[:, 0] = 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in (known, other):
            assert torch.allclose(compiled(x), full(x), atol=1e-5)
