"""One bit per weight: pack signs 8 to a byte, and read them back exactly.

Bit 1 is +1, bit 0 is -1. Element ``i`` of the flattened tensor is bit ``i % 8`` (least significant first) of byte
``i // 8``; the last byte is filled up with zeros. The shape travels beside the bytes.

Shapes: tensors of any shape with n elements <-> uint8 ``[ceil(n / 8)]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from dq_plugins.errors import DQError


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


@cache
def _byte_table(device: torch.device) -> Tensor:
    """The 8 signs of every byte as 8 int8, seen as one int64: ``[256]``. A lookup beats shifting each bit out."""
    bits = (torch.arange(256, dtype=torch.uint8, device=device)[:, None] >> _shifts(device)) & 1
    return (bits.to(torch.int8) * 2 - 1).contiguous().view(torch.int64).reshape(256)


def packed_bytes(shape: Sequence[int]) -> int:
    """Bytes that the signs of a tensor of this shape take."""
    return -(-prod(shape) // 8)


def pack_signs(x: Tensor) -> Tensor:
    """Signs of ``x``, 8 to a byte: uint8 ``[ceil(n / 8)]``.

    Example:
        >>> pack_signs(torch.tensor([1.0, -2.0, 0.0]))
        tensor([5], dtype=torch.uint8)
    """
    bits = (x.detach().reshape(-1) >= 0).to(torch.uint8)
    bits = pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    return (bits << _shifts(x.device)).sum(1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.int8) -> Tensor:
    """Tensor of +1 and -1 from packed signs.

    Args:
        packed: uint8 ``[ceil(n / 8)]``, as `pack_signs` made it.
        shape: shape of the result, n elements.
        dtype: signed dtype of the result.

    Raises:
        DQError: the number of bytes does not fit the shape.

    Example:
        >>> unpack_signs(torch.tensor([5], dtype=torch.uint8), (3,))
        tensor([ 1, -1,  1], dtype=torch.int8)
    """
    expected = packed_bytes(shape)
    if packed.dtype != torch.uint8 or packed.shape != (expected,):
        raise DQError(
            f"signs of shape {tuple(shape)} are {expected} packed bytes (uint8, one dimension); got {packed.dtype} of "
            f"shape {tuple(packed.shape)}"
        )
    signs = _byte_table(packed.device).index_select(0, packed.int()).view(torch.int8)
    return signs[: prod(shape)].reshape(tuple(shape)).to(dtype)
