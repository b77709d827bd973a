from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_plugins.errors import DQError
from dq_plugins.quantized.packing import pack_signs, packed_bytes, unpack_signs


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 2**31 - 1))
def test_round_trip_is_exact_for_any_shape(shape, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    packed = pack_signs(x)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(shape, 1) == (x.numel() + 7) // 8
    assert torch.equal(unpack_signs(packed, shape), torch.where(x >= 0, 1, -1).to(torch.int8))


def test_bits_are_least_significant_first():
    x = -torch.ones(10)
    x[0] = x[9] = 1
    assert pack_signs(x).tolist() == [0b00000001, 0b00000010]


def test_signs_of_any_numeric_dtype_pack_alike():
    signs = torch.tensor([1, -1, -1, 1, 1])
    packed = [pack_signs(signs.to(dtype)) for dtype in (torch.int8, torch.half, torch.double)]
    assert all(torch.equal(packed[0], other) for other in packed)


@pytest.mark.parametrize("bad", [torch.zeros(3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int8)])
def test_wrong_bytes_are_refused(bad):
    with pytest.raises(DQError, match="2 packed bytes"):
        unpack_signs(bad, (3, 4))
