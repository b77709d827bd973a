from __future__ import annotations

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_plugins.affine import integer_range
from dq_plugins.errors import DQError
from dq_plugins.quantized.packing import pack_bits, packed_bytes, unpack_bits

WIDTHS = [(bits, False) for bits in range(1, 9)] + [(1, True)]


def random_codes(shape, bits: int, signs: bool = False, seed: int = 0) -> torch.Tensor:
    low, high = integer_range(bits)
    generator = torch.Generator().manual_seed(seed)
    if signs:
        return torch.randint(0, 2, tuple(shape), generator=generator) * 2 - 1
    return torch.randint(low, high + 1, tuple(shape), generator=generator)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(WIDTHS), st.lists(st.integers(0, 6), max_size=4), st.integers(0, 2**31 - 1))
def test_round_trip_is_exact_for_any_width_and_shape(width, shape, seed):
    bits, signs = width
    codes = random_codes(shape, bits, signs, seed)
    packed = pack_bits(codes, bits, signs=signs)
    assert (packed.dtype, packed.numel()) == (torch.uint8, packed_bytes(shape, bits))
    unpacked = unpack_bits(packed, bits, shape, signs=signs)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked.long(), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_are_one_little_endian_bit_string(bits):
    codes = random_codes((13,), bits)
    packed = pack_bits(codes, bits)
    string = sum(int(code) % 2**bits << (i * bits) for i, code in enumerate(codes))
    assert bytes(packed.tolist()) == string.to_bytes(packed_bytes((13,), bits), "little")


@pytest.mark.parametrize("bits", range(1, 9))
def test_no_more_than_a_byte_is_wasted_on_disk(bits, tmp_path):
    codes = random_codes((37, 53), bits)
    safetensors.torch.save_file({"weight": pack_bits(codes, bits)}, tmp_path / "packed.safetensors")
    safetensors.torch.save_file({"weight": torch.zeros(0, dtype=torch.uint8)}, tmp_path / "empty.safetensors")
    header = 16  # the text of the header grows with the digits of the sizes, padded to 8 bytes
    payload = (tmp_path / "packed.safetensors").stat().st_size - (tmp_path / "empty.safetensors").stat().st_size
    assert 0 <= payload - 37 * 53 * bits / 8 <= 1 + header


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64])
def test_any_integer_dtype_and_memory_layout_packs_alike(dtype):
    codes = random_codes((6, 5), 3).to(dtype)
    assert torch.equal(pack_bits(codes.t().contiguous().t(), 3), pack_bits(codes.to(torch.int32), 3))


@pytest.mark.parametrize("bits", range(1, 9))
def test_compilers_unpack_the_same(bits, monkeypatch):
    codes = random_codes((7, 13), bits).to(torch.int8)
    packed = pack_bits(codes, bits)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(unpack_bits(packed, bits, codes.shape), codes)


def test_packing_leaves_its_input_alone_and_shares_no_memory():
    codes = random_codes((16,), 8).to(torch.int8)
    before, packed = codes.clone(), pack_bits(codes, 8)
    unpack_bits(packed, 8, (16,)).zero_()
    packed.zero_()
    assert torch.equal(codes, before)


@pytest.mark.parametrize(
    ("codes", "bits", "signs"), [([4], 3, False), ([-5], 3, False), ([0], 1, True), ([-2], 1, True)]
)
def test_codes_out_of_range_are_refused(codes, bits, signs):
    with pytest.raises(DQError, match=r"lie in \["):
        pack_bits(torch.tensor(codes), bits, signs=signs)


@pytest.mark.parametrize(("bits", "signs"), [(0, False), (9, False), (2, True)])
def test_unknown_widths_are_refused(bits, signs):
    with pytest.raises(DQError, match="packed codes have 1 to 8 bits"):
        pack_bits(torch.zeros(3, dtype=torch.int8), bits, signs=signs)


def test_floating_point_is_refused():
    with pytest.raises(DQError, match="quantize first"):
        pack_bits(torch.ones(3), 4)


def test_bytes_that_do_not_fit_the_shape_are_refused():
    with pytest.raises(DQError, match="8 packed bytes"):
        unpack_bits(torch.zeros(7, dtype=torch.uint8), 3, (3, 7))
