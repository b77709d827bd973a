"""Convolutions that multiply int8 codes.

Shapes: ``x [N, C, *size]``, weight codes ``[O, C/groups, *kernel]``, result ``[N, O, *size']``; ``N`` may be missing.
Images stay channels last in memory; sequences and videos are laid out as PyTorch's own layers leave them.

Borders: zero has an exact code, the zero point, so padding the input with zeros and padding its codes with ``z`` are
the same. The kernels do the latter by themselves where the whole batch shares one ``z`` and both sides get the same
number of zeros; everything else is padded before it is quantized.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dq_torchao.kernels import int8_conv2d
from dq_torchao.kernels.product import takes, takes_conv2d
from dq_torchao.layer import IntegerLayer
from dq_torchao.planes import Window, plane


class IntegerConvolution(IntegerLayer):
    """A convolution in integers, with activation parameters from the group table.

    ``stride``, ``padding``, ``dilation``, ``groups`` and ``padding_mode`` are those of PyTorch's layer.
    """

    operator = "conv2d"

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]  # PyTorch's convolutions keep what F.pad wants under this name

    def forward(self, input: Tensor) -> Tensor:
        """See `IntegerLayer.forward`."""
        batched = input.dim() == len(self.stride) + 2
        y = super().forward(input if batched else input.unsqueeze(0))
        y = y if y.dim() == 4 else y.contiguous()
        return y if batched else y.squeeze(0)

    @property
    def _none(self) -> tuple[int, ...]:
        return (0,) * len(self.stride)

    @property
    def _kernel_padding(self) -> tuple[int, ...]:
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return self._none
        return self.padding

    def padded(self, x: Tensor, wholly: bool = False) -> Tensor:
        """See `IntegerLayer.padded`."""
        if not any(self._reversed_padding_repeated_twice) or not (wholly or self._kernel_padding == self._none):
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
        padding = self._none if wholly else self._kernel_padding
        window = Window(self.kernel_size, self.stride, padding, self.dilation)
        image, shape, apart, back = plane(codes, self.weight_shape, window, zero_point)
        packed, _, *stored = self.stored_weight
        weight = ((packed, shape, *stored), self.weight_scale, bias)
        return back(int8_conv2d(image, scale, zero_point, *weight, *apart, self.groups, (), dtype))

    def multiply_floats(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """See `IntegerLayer.multiply_floats`."""
        inner = self._slid_over(x, down.reshape(len(down), *self.weight_shape[1:]))
        return self._convolve(inner, up.reshape(*up.shape, *[1] * len(self.stride)))

    def with_kept(self, y: Tensor, inside: Tensor, weight: Tensor) -> Tensor:
        """See `IntegerLayer.with_kept`."""
        return y + self._slid_over(inside, weight)

    def _slid_over(self, x: Tensor, weight: Tensor) -> Tensor:
        window = self.stride, self._kernel_padding, self.dilation
        return self._convolve(self.padded(x), weight, None, *window)

    @property
    def _convolve(self) -> Callable[..., Tensor]:
        return (F.conv1d, F.conv2d, F.conv3d)[len(self.stride) - 1]


class IntegerConv1d(IntegerConvolution, nn.Conv1d):
    """Conv1d in integers; see `IntegerConvolution`."""


class IntegerConv2d(IntegerConvolution, nn.Conv2d):
    """Conv2d in integers; see `IntegerConvolution`."""

    def takes_rows(self, codes: Tensor, dtype: torch.dtype, bias: Tensor | None) -> bool:
        """See `RowRanges.takes_rows`."""
        own = takes(dtype, bias) and takes_conv2d(self.weight_shape, self.groups, ())
        return codes.device.type == "cpu" and own


class IntegerConv3d(IntegerConvolution, nn.Conv3d):
    """Conv3d in integers; see `IntegerConvolution`."""
