from __future__ import annotations

import pytest
import torch
from dq_torchao.kernels import activation_codes, code_offset

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
