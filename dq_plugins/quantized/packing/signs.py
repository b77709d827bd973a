"""One bit per weight: signs of floating-point tensors, 8 to a byte. Bit 1 is +1 (and zero), bit 0 is -1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dq_plugins.quantized.packing.bits import pack_bits, unpack_bits


def pack_signs(x: Tensor) -> Tensor:
    """Signs of ``x``, 8 to a byte: uint8 ``[ceil(n / 8)]``.

    Example:
        >>> pack_signs(torch.tensor([1.0, -2.0, 0.0]))
        tensor([5], dtype=torch.uint8)
    """
    return pack_bits((x.detach() >= 0).to(torch.uint8), 1, "unsigned")


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
    return unpack_bits(packed, 1, shape, "signs").to(dtype)
