from __future__ import annotations

import pytest
import torch
from dq_torchao.kernels import dynamic_codes, native

from dq_plugins.layer_kinds import LAYER_KINDS
from dq_plugins.plan import DynamicActivationQuant
from dq_plugins.quantized.input_quantizers import quantize_dynamically
from dq_plugins.quantized.layer_transform import LayerTransform

LOUD = torch.logspace(-4, 5, 6)
LAST = torch.randn(6, 20, 5, 3).to(memory_format=torch.channels_last)
INPUTS = {  # kind, input
    "tokens": ("linear", torch.randn(2, 3, 21) * LOUD.reshape(2, 3, 1)),
    "one token": ("linear", torch.randn(130)),
    "many tokens": ("linear", torch.randn(6, 300, 70) * LOUD.reshape(6, 1, 1)),
    "channels last": ("conv2d", LAST * LOUD.reshape(6, 1, 1, 1)),
    "channels first": ("conv2d", torch.randn(6, 20, 5, 3) * LOUD.reshape(6, 1, 1, 1)),
    "large": ("conv2d", torch.randn(2, 40, 40, 41).to(memory_format=torch.channels_last)),
    "sequence": ("conv1d", torch.randn(6, 20, 5) * LOUD.reshape(6, 1, 1)),
    "video": ("conv3d", torch.randn(6, 4, 2, 5, 3) * LOUD.reshape(6, 1, 1, 1, 1)),
    "a slice": ("linear", torch.randn(2, 7, 40)[..., ::2]),
    "zero": ("conv2d", torch.zeros(2, 4, 3, 3)),
    "positive": ("conv2d", torch.rand(2, 4, 3, 3).to(memory_format=torch.channels_last)),
    "empty": ("linear", torch.randn(0, 20)),
}


@pytest.mark.parametrize(("bits", "clip"), [(8, 1.0), (5, 0.8), (2, 0.55)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("name", INPUTS)
def test_the_kernel_makes_the_codes_of_the_definition(name, balanced, symmetric, bits, clip, monkeypatch):
    (kind, x), quant = INPUTS[name], DynamicActivationQuant(bits, symmetric, clip)
    spatial = LAYER_KINDS[kind].spatial
    balance = torch.rand(x.shape[-1 - spatial]) + 0.5 if balanced else None
    factor = None if balance is None else LAYER_KINDS[kind].per_output(balance.reciprocal())
    codes, scale, zero_point = dynamic_codes(x, factor, quant, spatial)
    monkeypatch.setattr(native, "why_not", lambda: "as it is without a compiler")
    plain = dynamic_codes(x, factor, quant, spatial)
    for found, expected in zip((codes, scale, zero_point), plain, strict=True):
        assert torch.equal(found, expected)
        assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    transform = None if balance is None else LayerTransform(balance)
    simulated = quantize_dynamically(x, quant, transform, LAYER_KINDS[kind])
    values = (codes.float() - zero_point) * scale
    torch.testing.assert_close(values if factor is None else values / factor, simulated, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(7, 999, 130), (2, 3, 130)])
@pytest.mark.parametrize("spatial", [0, 2])
def test_threads_share_the_work(spatial, shape):
    x = torch.randn(shape)
    if spatial:
        x = torch.randn(*shape[:2], 13, 10).contiguous(memory_format=torch.channels_last)
    factor, quant = torch.rand(x.shape[-1 - spatial], *[1] * spatial) + 0.5, DynamicActivationQuant(8, symmetric=False)
    one, threads = [dynamic_codes(x, f, quant, spatial) for f in (factor, None)], torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        many = [dynamic_codes(x, f, quant, spatial) for f in (factor, None)]
    finally:
        torch.set_num_threads(threads)
    for first, second in zip(one, many, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
