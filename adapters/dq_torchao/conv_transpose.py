"""Transposed convolutions that multiply int8 codes: every phase an ordinary one (`dq_torchao.kernels.phases`).

Shapes: ``x [N, C, *size]``, weight codes ``[C, O/groups, *kernel]``, result ``[N, O, *size']``; ``N`` may be missing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dq_torchao.kernels import code_offset, int8_conv2d
from dq_torchao.kernels.phases import border, cropped, side_by_side, taps
from dq_torchao.layer import IntegerLayer
from dq_torchao.planes import Window, plane


class IntegerConvTranspose(IntegerLayer):
    """A transposed convolution in integers, with activation parameters from the group table.

    ``stride``, ``padding``, ``output_padding``, ``dilation`` and ``groups`` are those of PyTorch's layer. Its weight
    has one scale, because an output sums over dimension 0 of it.
    """

    operator = "conv2d"

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """See `IntegerLayer.forward`; ``output_size`` as PyTorch's layer takes it."""
        n = len(self.stride)
        if output_size is not None:
            layer: Any = copy.copy(self)
            sizes = (self.stride, self.padding, self.kernel_size, n, self.dilation)
            layer.output_padding = tuple(layer._output_padding(input, list(output_size), *sizes))
            return layer.forward(input)
        y = super().forward(input if input.dim() == n + 2 else input.unsqueeze(0)).contiguous()
        return y if input.dim() == n + 2 else y.squeeze(0)

    def release_weight(self) -> int:
        """Nothing: the kernel's form of the weight has another order, from which the packed one is not made again."""
        return 0

    @property
    def _border(self) -> list[tuple[int, int]]:
        return border(self.kernel_size, self.stride, self.padding, self.dilation, self.output_padding)

    @property
    def _kernel_padding(self) -> tuple[int, ...] | None:
        """Where the kernel can add all of the border by itself."""
        even = all(before == after >= 0 for before, after in self._border)
        return tuple(before for before, _ in self._border) if even else None

    def padded(self, x: Tensor, wholly: bool = False) -> Tensor:
        """See `IntegerLayer.padded`."""
        if not wholly and self._kernel_padding is not None:
            return x
        return F.pad(x, [n for pair in reversed(self._border) for n in pair])

    def code_sums(self, codes: Tensor) -> Tensor:
        """See `IntegerLayer.code_sums`; positions see other taps than their neighbours, so the kernel adds them up."""
        one, zero = torch.ones_like(self.weight_scale[:1]), code_offset(codes.device)
        ones = torch.full_like(codes[:1], 1 + zero)
        return self.multiply(ones, one, one.to(torch.int32) * zero, None, torch.float32, wholly=True)

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
        packed, stored_shape, *stored = self.stored_weight
        phases, ones = prod(self.stride), (1,) * len(self.stride)
        kernel = taps(self.kernel_size, self.stride, self.dilation)
        outputs = stored_shape[1] * self.groups * phases
        by_kernel = None if wholly else self._kernel_padding
        window = Window(kernel, ones, by_kernel or (0,) * len(ones), ones)
        shape = (outputs, stored_shape[0] // self.groups, *kernel)
        image, shape, apart, back = plane(codes, shape, window, zero_point)
        bias = None if bias is None else bias.repeat_interleave(phases)
        weight = ((packed, shape, *stored), self.weight_scale[:1].expand(outputs).contiguous(), bias)
        transposed = (*stored_shape, *self.stride, *self.dilation)
        y = back(int8_conv2d(image, scale, zero_point, *weight, *apart, self.groups, transposed, dtype))
        return self._cropped(side_by_side(y, self.stride), codes, padded=by_kernel is None)

    def _cropped(self, y: Tensor, codes: Tensor, padded: bool) -> Tensor:
        size = [have - sum(pair) * padded for have, pair in zip(codes.shape[2:], self._border, strict=True)]
        window = zip(size, self.kernel_size, self.stride, self.padding, self.dilation, self.output_padding, strict=True)
        out = [(length - 1) * s - 2 * p + (k - 1) * d + 1 + extra for length, k, s, p, d, extra in window]
        return cropped(y, [p % s for p, s in zip(self.padding, self.stride, strict=True)], out)


class IntegerConvTranspose1d(IntegerConvTranspose, nn.ConvTranspose1d):
    """ConvTranspose1d in integers; see `IntegerConvTranspose`."""


class IntegerConvTranspose2d(IntegerConvTranspose, nn.ConvTranspose2d):
    """ConvTranspose2d in integers; see `IntegerConvTranspose`."""


class IntegerConvTranspose3d(IntegerConvTranspose, nn.ConvTranspose3d):
    """ConvTranspose3d in integers; see `IntegerConvTranspose`."""
