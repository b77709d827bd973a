"""Integer products of binary weights and integer activations, exact.

    acc[m, o] = sum_k a[m, k] b[o, k]          a: int8 codes, b: -1 or +1 (or any int8), acc: int32

Two kernels give the same integers:

- ``int_matmul``: the int8 matrix kernel of the device (``torch._int_mm``: oneDNN on CPU, cuBLASLt on CUDA).
- ``bit_serial_matmul``: activations as bit planes ``a = sum_j c_j a_j`` with ``a_j`` in {0, 1} and
  ``c_j = 2^j`` (``-2^(b-1)`` for the highest, two's complement). With the weights' bits ``m = (b + 1) / 2``

      acc = sum_j c_j (2 popcount(m & a_j) - popcount(a_j)) = 2 sum_j c_j popcount(m & a_j) - sum_k a_k

  so 64 products take one AND and one popcount (XNOR networks, Rastegari et al. 2016; BinaryDM measures with it).

Shapes: M rows, K inputs, O outputs, W = ceil(K / 64) words, ``bits`` planes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from dq_plugins.errors import DQError

WORDS_IN_FLIGHT = 1 << 21
"""Words of intermediate results the bit-serial kernel holds at a time: 16 MB."""


def int_matmul(codes: Tensor, weight: Tensor) -> Tensor:
    """Exact integer product.

    Args:
        codes: int8 ``[M, K]``.
        weight: int8 ``[O, K]``.

    Returns:
        int32 ``[M, O]``.
    """
    rows, outputs = codes.shape[0], weight.shape[0]
    if codes.device.type == "cuda":  # cuBLASLt takes more than 16 rows and multiples of 8
        codes = pad(codes, (0, -codes.shape[1] % 8, 0, max(0, 17 - rows)))
        weight = pad(weight, (0, -weight.shape[1] % 8, 0, -outputs % 8))
    return torch._int_mm(codes.contiguous(), weight.contiguous().t())[:rows, :outputs]


def pack_rows(weight: Tensor) -> Tensor:
    """Bits of the signs of each row, 64 to a word: int64 ``[O, W]`` of ``[O, K]``; bit 1 is +1."""
    return _words((weight >= 0)[None])[0]


def bit_planes(codes: Tensor, bits: int) -> Tensor:
    """Two's complement planes of integer codes: bool ``[bits, ...]``, least significant first.

    Raises:
        DQError: a code does not fit ``bits`` bits.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if codes.numel() and not (low <= int(codes.min()) and int(codes.max()) <= high):
        raise DQError(f"codes in [{int(codes.min())}, {int(codes.max())}] do not fit {bits} signed bits")
    return torch.stack([((codes >> j) & 1).bool() for j in range(bits)])


def plane_weights(bits: int) -> list[int]:
    """Worth of each plane: 1, 2, 4, ... and minus for the highest."""
    return [2**j for j in range(bits - 1)] + [-(2 ** (bits - 1))]


def _words(bits: Tensor) -> Tensor:
    """Bool ``[P, R, K]`` -> int64 ``[P, R, W]``."""
    packed = np.packbits(pad(bits, (0, -bits.shape[-1] % 64)).cpu().numpy(), axis=-1, bitorder="little")
    return torch.from_numpy(packed.view(np.int64)).to(bits.device)


def popcount(words: Tensor) -> Tensor:
    """Number of one bits of each int64, as int64 (numpy's instruction where there is one)."""
    if words.device.type == "cpu" and hasattr(np, "bitwise_count"):
        # numpy counts the bits of |x| for signed types
        return torch.from_numpy(np.bitwise_count(words.numpy().view(np.uint64))).long()
    low, high = words & 0xFFFFFFFF, (words >> 32) & 0xFFFFFFFF
    return _popcount32(low) + _popcount32(high)


def _popcount32(x: Tensor) -> Tensor:
    """Bits of the low halves (non-negative int64 below 2^32), by adding neighbours in pairs, fours, eights."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF


def bit_serial_matmul(codes: Tensor, rows: Tensor, bits: int) -> Tensor:
    """Exact integer product with packed binary weights.

    Args:
        codes: int8 ``[M, K]`` that fit ``bits`` signed bits.
        rows: int64 ``[O, W]``, as `pack_rows` made it.
        bits: width of the codes, 2 to 8.

    Returns:
        int32 ``[M, O]``.
    """
    planes = _words(bit_planes(codes, bits))
    if planes.shape[-1] != rows.shape[-1]:
        raise DQError(f"{codes.shape[1]} inputs are {planes.shape[-1]} words, the packed weight has {rows.shape[-1]}")
    m, o, words = codes.shape[0], rows.shape[0], rows.shape[-1]
    accumulator = -codes.sum(1, dtype=torch.int64)[:, None].expand(m, o).clone()
    block = max(1, WORDS_IN_FLIGHT // max(1, o * words))
    for start in range(0, m, block):
        for worth, plane in zip(plane_weights(bits), planes[:, start : start + block], strict=True):
            counts = popcount(plane[:, None, :] & rows[None]).sum(-1)
            accumulator[start : start + block] += 2 * worth * counts
    return accumulator.int()
