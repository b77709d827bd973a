from __future__ import annotations

import pytest
import torch

from dq_plugins.errors import DQError
from dq_plugins.passes.binarization import integer
from dq_plugins.passes.binarization.integer import (
    bit_planes,
    bit_serial_matmul,
    int_matmul,
    pack_rows,
    plane_weights,
    popcount,
)


def operands(m, k, o, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (m, k), generator=generator).to(torch.int8)
    weight = (torch.randint(0, 2, (o, k), generator=generator) * 2 - 1).to(torch.int8)
    return codes, weight, (codes.long() @ weight.long().t()).int()


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 64, 3), (7, 65, 9), (33, 200, 17)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_both_kernels_give_the_exact_integers(shape, bits):
    codes, weight, expected = operands(*shape, bits)
    assert torch.equal(int_matmul(codes, weight), expected)
    assert torch.equal(bit_serial_matmul(codes, pack_rows(weight), bits), expected)


def test_bit_serial_in_blocks_is_the_same(monkeypatch):
    codes, weight, expected = operands(13, 130, 5, 4)
    monkeypatch.setattr(integer, "WORDS_IN_FLIGHT", 40)
    assert torch.equal(bit_serial_matmul(codes, pack_rows(weight), 4), expected)


def test_planes_of_int4_add_up_to_the_code():
    codes = torch.arange(-8, 8, dtype=torch.int8)
    planes = bit_planes(codes, 4)
    assert plane_weights(4) == [1, 2, 4, -8]
    assert torch.equal(sum(w * p.int() for w, p in zip(plane_weights(4), planes, strict=True)), codes.int())


def test_codes_too_wide_for_the_planes_are_refused():
    with pytest.raises(DQError, match="do not fit 4 signed bits"):
        bit_planes(torch.tensor([8], dtype=torch.int8), 4)


def test_mismatched_widths_are_refused():
    codes, weight, _ = operands(2, 200, 3, 4)
    with pytest.raises(DQError, match="packed weight has"):
        bit_serial_matmul(codes[:, :64], pack_rows(weight), 4)


@pytest.mark.parametrize("native", [True, False])
def test_popcount_of_every_kind_of_word(monkeypatch, native):
    if not native:
        monkeypatch.delattr(integer.np, "bitwise_count", raising=False)
    words = torch.randint(-(2**63), 2**63 - 1, (500,))
    words[:3] = torch.tensor([-1, -(2**63), 0])
    expected = [bin(int(w) & (2**64 - 1)).count("1") for w in words]
    assert popcount(words).tolist() == expected
