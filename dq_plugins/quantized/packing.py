"""Pack integers of 1 to 8 bits into bytes, and read them back exactly.

The bytes are one little-endian bit string: code ``i`` of the flattened tensor takes its bits ``i b`` to
``i b + b - 1``, and bit ``j`` of the string is bit ``j % 8`` of byte ``j // 8``. Rows are not aligned to bytes, so a
tensor of ``n`` codes takes ``ceil(n b / 8)`` bytes, whatever its shape. Shape and width travel beside them.

Codes are signed integers; with ``signs``, one bit a code, they are -1 and +1.

Eight codes fill ``b`` bytes exactly, so eight at a time are moved inside one 64-bit word (of a little-endian machine).

Shapes: tensors of any shape with n codes <-> uint8 ``[ceil(n b / 8)]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from dq_plugins.affine import integer_range
from dq_plugins.errors import DQError

_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}
"""Widths that divide a byte, and the dtype that holds the codes of one."""


def packed_bytes(shape: Sequence[int], bits: int) -> int:
    """Bytes that a tensor of ``bits``-bit codes takes.

    Example:
        >>> packed_bytes((3, 3), bits=3)
        4
    """
    return -(-prod(shape) * bits // 8)


def pack_bits(codes: Tensor, bits: int, *, signs: bool = False) -> Tensor:
    """Pack integer codes.

    Args:
        codes: integers of any shape and dtype.
        bits: width, 1 to 8.
        signs: the codes are -1 and +1.

    Returns:
        uint8 ``[ceil(n bits / 8)]``.

    Raises:
        DQError: no such width, or a code that it cannot hold.

    Example:
        >>> pack_bits(torch.tensor([1, -1, 0, -2]), bits=2).tolist()
        [141]
    """
    _check_codes(codes, bits, signs)
    flat = codes.detach().reshape(-1)
    if signs:
        values = (flat > 0).to(torch.uint8)
    elif bits == 8:
        return flat.to(torch.int8).view(torch.uint8).clone()
    else:
        values = flat.to(torch.int8).view(torch.uint8) & ((1 << bits) - 1)
    words = _squeeze(pad(values, (0, -len(values) % 8)).view(torch.int64), bits)
    return words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)[: packed_bytes(codes.shape, bits)].clone()


def unpack_bits(packed: Tensor, bits: int, shape: Sequence[int], *, signs: bool = False) -> Tensor:
    """Read packed codes.

    Args:
        packed: uint8 ``[ceil(n bits / 8)]``, as `pack_bits` made it.
        bits: width, 1 to 8.
        shape: shape of the result, n codes.
        signs: the codes are -1 and +1.

    Returns:
        int8 codes of this shape.

    Raises:
        DQError: the number of bytes does not fit the shape.

    Example:
        >>> unpack_bits(torch.tensor([141], dtype=torch.uint8), 2, (4,)).tolist()
        [1, -1, 0, -2]
    """
    expected = packed_bytes(shape, bits)
    if packed.dtype != torch.uint8 or packed.shape != (expected,):
        raise DQError(
            f"{bits}-bit codes of shape {tuple(shape)} are {expected} packed bytes (uint8, one dimension); got "
            f"{packed.dtype} of shape {tuple(packed.shape)}"
        )
    if bits == 8:
        codes = packed.view(torch.int8).clone()
    elif bits in _WORDS and not torch.compiler.is_compiling():  # compilers warn of the cached table, and fuse shifts
        codes = _byte_table(bits, signs, packed.device).index_select(0, packed.int()).view(torch.int8)
    else:
        codes = _spell_out(_spread(_words(packed, bits), bits).view(torch.uint8), bits, signs)
    return codes[: prod(shape)].reshape(tuple(shape))


def _check_codes(codes: Tensor, bits: int, signs: bool) -> None:
    if not isinstance(bits, int) or not 1 <= bits <= (1 if signs else 8):
        raise DQError(f"packed codes have 1 to 8 bits, and signs one; got bits={bits!r}, signs={signs}")
    if codes.is_floating_point() or codes.is_complex():
        raise DQError(f"only integers can be packed, got {codes.dtype}; quantize first")
    if codes.is_meta or not codes.numel():
        return
    low, high = (-1, 1) if signs else integer_range(bits)
    least, most = (int(v) for v in codes.aminmax())
    if least < low or most > high or (signs and bool((codes == 0).any())):
        raise DQError(f"codes of {bits} bits lie in [{low}, {high}]{', without 0' * signs}; found [{least}, {most}]")


def _lanes(width: int, value_bits: int) -> int:
    """Word whose lanes of ``width`` bits, every other one, have their lowest ``value_bits`` bits set."""
    return sum(((1 << value_bits) - 1) << at for at in range(0, 64, 2 * width))


def _squeeze(words: Tensor, bits: int) -> Tensor:
    """Close the gaps of eight codes in the bytes of a word: lanes are joined in pairs, three times.

    int64 ``[groups]``, overwritten; the result takes the lowest ``8 bits`` bits.
    """
    for width, value in ((8, bits), (16, 2 * bits), (32, 4 * bits)):
        low = _lanes(width, value)
        high = words >> (width - value)
        words.bitwise_and_(low).bitwise_or_(high.bitwise_and_(low << value))
    return words


def _words(packed: Tensor, bits: int) -> Tensor:
    """The bytes of eight codes each, as the lowest of one word: int64 ``[groups]``. Higher bytes hold anything."""
    groups = -(-len(packed) // bits)
    if packed.device.type == "cpu" and type(packed) is Tensor and groups and not torch.compiler.is_compiling():
        # numpy reads words that begin at any byte and overlap, at several times the speed of copying bytes apart
        data = pad(packed.detach(), (0, 8 + groups * bits - len(packed))).numpy()
        return torch.from_numpy(np.ndarray((groups,), np.int64, data, strides=(bits,)).copy())
    rows = pad(packed, (0, groups * bits - len(packed))).view(groups, bits)
    return pad(rows, (0, 8 - bits)).view(torch.int64).view(-1)


def _spread(words: Tensor, bits: int) -> Tensor:
    """The way back from `_squeeze`."""
    for width, value in ((32, 4 * bits), (16, 2 * bits), (8, bits)):
        low = _lanes(width, value)
        high = words << (width - value)
        words.bitwise_and_(low).bitwise_or_(high.bitwise_and_(low << width))
    return words


def _spell_out(values: Tensor, bits: int, signs: bool) -> Tensor:
    """Bare bits to codes, in place."""
    if signs:
        return values.view(torch.int8).mul_(2).sub_(1)
    sign = 1 << (bits - 1)
    return values.bitwise_xor_(sign).view(torch.int8).sub_(sign)


@cache
def _byte_table(bits: int, signs: bool, device: torch.device) -> Tensor:
    """All ``8 / bits`` codes of every byte, seen as one word: ``[256]``. A lookup beats shifting each code out."""
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    values = torch.stack([byte >> shift for shift in range(0, 8, bits)], 1) & ((1 << bits) - 1)
    return _spell_out(values, bits, signs).view(_WORDS[bits]).reshape(256)
