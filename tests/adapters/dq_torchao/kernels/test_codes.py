from __future__ import annotations

import pytest
import torch
from dq_torchao.kernels import activation_codes, code_offset, native
from dq_torchao.kernels.codes import one_pass

from dq_plugins.affine import integer_range, quantize


@pytest.mark.parametrize("bits", [8, 6, 4, 2])
@pytest.mark.parametrize("scale", [0.1, 1 / 3, 0.25, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_those_of_the_definition(bits, scale, dtype):
    low, high = integer_range(bits)
    s, z = torch.tensor([scale]), torch.tensor([low // 3], dtype=torch.int32)
    torch.manual_seed(0)
    ties = (torch.arange(low - 3, high + 3) + 0.5) * scale
    x = torch.cat([ties, torch.randn(1000) * scale * high]).to(dtype)
    offset = code_offset(x.device)
    codes = activation_codes(x, s.reciprocal(), z + offset, bits)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.float() - offset, quantize(x.float(), s, z, low, high))


LAYOUTS = {  # input, shape of a balance
    "tokens": (torch.randn(2, 7, 20), (20,)),
    "rows of one": (torch.randn(5, 1), (1,)),
    "many tokens": (torch.randn(2, 300, 130), (130,)),
    "channels last": (torch.randn(2, 20, 5, 3).to(memory_format=torch.channels_last), (20, 1, 1)),
    "channels first": (torch.randn(2, 20, 5, 3), (20, 1, 1)),
    "a slice": (torch.randn(2, 7, 40)[..., ::2], (20,)),
    "expanded": (torch.randn(1, 1, 20).expand(3, 7, 20), (20,)),
    "empty": (torch.randn(0, 20), (20,)),
}


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_pass_makes_the_codes_of_the_definition_in_any_layout(layout, balanced, monkeypatch):
    x, shape = LAYOUTS[layout]
    factor = torch.tensor([37.0]) * (torch.rand(shape) + 0.5 if balanced else 1.0)
    zero = torch.tensor([128 - 9], dtype=torch.int32)
    codes = activation_codes(x, factor, zero, 8)
    assert one_pass(x, factor, zero) == (
        layout not in ("a slice", "expanded", "empty") and not (balanced and layout == "channels first")
    )
    monkeypatch.setattr(native, "why_not", lambda: "as it is without a compiler")
    plain = activation_codes(x, factor, zero, 8)
    assert torch.equal(codes, plain)
    assert (codes.stride(), codes.dtype) == (plain.stride(), plain.dtype)


def test_threads_share_the_work(monkeypatch):
    x, factor, zero = torch.randn(3, 999, 130), torch.rand(130) * 40, torch.tensor([100], dtype=torch.int32)
    codes = [activation_codes(x, f, zero, 8) for f in (factor, factor[:1])]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(
            torch.equal(activation_codes(x, f, zero, 8), c) for f, c in zip((factor, factor[:1]), codes, strict=True)
        )
    finally:
        torch.set_num_threads(threads)


def test_infinity_is_clipped_and_a_compiler_sees_the_definition():
    x, factor, zero = (
        torch.tensor([-torch.inf, 0.0, torch.inf, 1e30]),
        torch.ones(1),
        torch.tensor([128], dtype=torch.int32),
    )
    assert activation_codes(x, factor, zero, 8).tolist() == [0, 128, 255, 255]
    torch._dynamo.reset()
    graph = torch.export.export(_Codes(), (x, factor, zero)).graph
    assert not [node for node in graph.nodes if "dq_torchao" in str(node.target)]


class _Codes(torch.nn.Module):
    def forward(self, x, factor, zero):
        return activation_codes(x, factor, zero, 8)
