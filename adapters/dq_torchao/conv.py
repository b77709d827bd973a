"""Convolutions that multiply int8 codes.

Shapes: ``x [N, C, H, W]``, weight codes ``[O, C/groups, h, w]``, result ``[N, O, H', W']``, channels last in memory.

Borders: zero has an exact code, the zero point, so padding the input with zeros and padding its codes with ``z`` are
the same. The kernels do the latter by themselves where the whole batch shares one ``z`` and both sides get the same
number of zeros; everything else is padded before it is quantized.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dq_torchao.kernels import int8_conv2d
from dq_torchao.layer import IntegerLayer

_NONE = (0, 0)


class IntegerConv2d(IntegerLayer, nn.Conv2d):
    """Conv2d in integers, with activation parameters from the group table.

    ``stride``, ``padding``, ``dilation``, ``groups`` and ``padding_mode`` are those of ``nn.Conv2d``.
    """

    operator = "conv2d"

    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]  # nn.Conv2d keeps what F.pad wants under this name

    @property
    def _kernel_padding(self) -> tuple[int, int]:
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return _NONE
        return self.padding

    def padded(self, x: Tensor, wholly: bool = False) -> Tensor:
        """See `IntegerLayer.padded`."""
        if not any(self._reversed_padding_repeated_twice) or not (wholly or self._kernel_padding == _NONE):
            return x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._reversed_padding_repeated_twice, mode=mode)

    def multiply(
        self,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        wholly: bool = False,
    ) -> Tensor:
        """See `IntegerLayer.multiply`."""
        padding = _NONE if wholly else self._kernel_padding
        weight = (self.stored_weight, self.weight_scale, bias)
        window = (self.stride, padding, self.dilation, self.groups)
        return int8_conv2d(codes, scale, zero_point, *weight, *window, dtype)

    def multiply_floats(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """See `IntegerLayer.multiply_floats`."""
        window = down.reshape(len(down), *self.weight_shape[1:])
        inner = F.conv2d(self.padded(x), window, None, self.stride, self._kernel_padding, self.dilation)
        return F.conv2d(inner, up[:, :, None, None])
