"""Layers that store their weight in integers and multiply integers: what a trained layer becomes.

Weights take one bit (8 to a byte, on disk and in memory) or eight; activations are int8 codes of 2 to 8 bits.

    y = s_x s_w[o] acc[o] + bias[o],     acc exact in int32

Shapes: O output channels, K inputs of one output (channels of a group times taps), M rows (tokens or pixels).
"""

from __future__ import annotations

from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dq_plugins.affine import integer_range, quantize
from dq_plugins.passes.binarization.integer import bit_serial_matmul, int_matmul, pack_rows
from dq_plugins.quantized.packing import pack_signs, unpack_signs

Kernel = Literal["auto", "int8", "bit-serial"]

# Where the bit-serial kernel won on an x86 server core: reading 1 bit a weight pays off once the weight no longer
# fits the cache and only a row or so shares the reading (benchmarks/binary_kernels.py measures it).
BIT_SERIAL_ROWS_TIMES_BITS = 4
BIT_SERIAL_WEIGHTS = 1 << 23


class IntegerWeight(nn.Module):
    """A weight ``[O, ...]`` as packed signs or int8 codes, and one scale per output channel.

    Args:
        codes: int8 of the weight's shape; only -1 and +1 when ``binary``.
        scale: float32 ``[O]``, positive.
        binary: store one bit a weight.

    Attributes:
        data: uint8 ``[ceil(n / 8)]`` (binary) or int8 of the weight's shape.
    """

    data: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, binary: bool) -> None:
        super().__init__()
        self.shape, self.binary = tuple(codes.shape), binary
        self.register_buffer("data", pack_signs(codes) if binary else codes.to(torch.int8))
        self.register_buffer("scale", scale.detach().float().clone())

    def codes(self) -> Tensor:
        """int8 of the weight's shape."""
        return unpack_signs(self.data, self.shape) if self.binary else self.data

    def words(self) -> Tensor:
        """Packed rows for the bit-serial kernel: int64 ``[O, W]``; no unpacking where rows begin at a byte."""
        outputs = self.shape[0]
        inputs = prod(self.shape[1:])
        if inputs % 8:
            return pack_rows(self.codes().flatten(1))
        rows = self.data.view(outputs, inputs // 8)
        return F.pad(rows, (0, -rows.shape[1] % 8)).view(torch.int64)

    def dequantized(self) -> Tensor:
        """float32 weight, exactly what the trained layer computed with."""
        return self.codes().float() * self.scale.reshape(-1, *[1] * (len(self.shape) - 1))

    def extra_repr(self) -> str:
        """Shape and width."""
        return f"{list(self.shape)}, bits={1 if self.binary else 8}"


class IntegerLayer(nn.Module):
    """A linear layer or convolution that multiplies integers.

    Args:
        weight: the stored weight.
        bias: ``[O]`` or None.
        input_scale: scale of the input codes; None: the input stays in floating point.
        act_bits: width of the input codes.
        kernel: ``"int8"``, ``"bit-serial"`` (binary weights only) or ``"auto"``.
    """

    input_scale: Tensor | None

    def __init__(
        self,
        weight: IntegerWeight,
        bias: Tensor | None,
        input_scale: Tensor | None,
        act_bits: int = 8,
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        self.weight, self.act_bits, self.kernel = weight, act_bits, kernel
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_buffer("input_scale", None if input_scale is None else input_scale.detach().float().clone())

    def input_codes(self, x: Tensor) -> Tensor:
        """int8 codes of the input."""
        return quantize(x.float(), self.input_scale, 0, *integer_range(self.act_bits)).to(torch.int8)

    def bit_serial(self, rows: int) -> bool:
        """Whether the bit-serial kernel takes a product with this many rows."""
        if self.kernel == "auto":
            few = rows * self.act_bits <= BIT_SERIAL_ROWS_TIMES_BITS
            large = prod(self.weight.shape) >= BIT_SERIAL_WEIGHTS
            return few and large and self.weight.binary and self.weight.data.device.type == "cpu"
        return self.kernel == "bit-serial" and self.weight.binary

    def products(self, codes: Tensor) -> Tensor:
        """Exact int32 ``[M, O]`` of int8 ``[groups, M, K]`` with the weight, by the kernel that suits."""
        groups = codes.shape[0]
        if self.bit_serial(codes.shape[1]):
            weights = self.weight.words().chunk(groups)
            parts = [bit_serial_matmul(c, w, self.act_bits) for c, w in zip(codes, weights, strict=True)]
        else:
            weights = self.weight.codes().flatten(1).chunk(groups)
            parts = [int_matmul(c, w) for c, w in zip(codes, weights, strict=True)]
        return torch.cat(parts, dim=1)

    def rescale(self, accumulator: Tensor, dtype: torch.dtype) -> Tensor:
        """``[M, O]`` integers to output values."""
        y = accumulator.float() * (self.weight.scale * self.input_scale)
        return (y if self.bias is None else y + self.bias).to(dtype)


class IntegerLinear(IntegerLayer):
    """Linear layer over integers: ``[..., in]`` to ``[..., O]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        if self.input_scale is None:
            return F.linear(x, self.weight.dequantized().to(x.dtype), self.bias)
        codes = self.input_codes(x).reshape(1, -1, x.shape[-1])
        return self.rescale(self.products(codes), x.dtype).reshape(*x.shape[:-1], -1)


class IntegerConv(IntegerLayer):
    """Convolution of any dimension over integers, as a product with gathered patches.

    Args:
        geometry: the convolution it replaces; gives stride, padding, dilation and groups.
        layer: arguments of `IntegerLayer`.
    """

    def __init__(self, geometry: nn.Conv1d | nn.Conv2d | nn.Conv3d, *layer: object, **options: object) -> None:
        super().__init__(*layer, **options)  # type: ignore[arg-type]
        self.stride, self.dilation, self.kernel_size = geometry.stride, geometry.dilation, geometry.kernel_size
        self.groups = geometry.groups
        # what nn.Conv pads by itself: last dimension first, "same" padding resolved
        self.padding = list(geometry._reversed_padding_repeated_twice)
        self.pad_mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode

    def patches(self, codes: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Gather patches of ``[B, C, ...]``: ``[groups, M, K]`` and the output's spatial shape."""
        batch, channels, dims = codes.shape[0], codes.shape[1], codes.dim() - 2
        for d in range(dims):
            span = self.dilation[d] * (self.kernel_size[d] - 1) + 1
            codes = codes.unfold(2 + d, span, self.stride[d])[..., :: self.dilation[d]]
        space = tuple(codes.shape[2 : 2 + dims])
        grouped = codes.reshape(batch, self.groups, channels // self.groups, *codes.shape[2:])
        order = (1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
        inputs = channels // self.groups * prod(self.kernel_size)
        return grouped.permute(order).reshape(self.groups, batch * prod(space), inputs), space

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``[B, C, ...]`` to ``[B, O, ...]``."""
        if self.input_scale is None:
            return self._float_forward(x)
        codes = self.input_codes(x)
        if self.pad_mode != "constant":  # reflecting and so on are not written for integers
            codes = F.pad(codes.float(), self.padding, mode=self.pad_mode).to(torch.int8)
        else:
            codes = F.pad(codes, self.padding)
        patches, space = self.patches(codes)
        y = self.rescale(self.products(patches), x.dtype).reshape(x.shape[0], *space, -1)
        return y.movedim(-1, 1).contiguous()

    def _float_forward(self, x: Tensor) -> Tensor:
        convolution = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        x = F.pad(x, self.padding, mode=self.pad_mode)
        weight = self.weight.dequantized().to(x.dtype)
        return convolution(x, weight, self.bias, self.stride, 0, self.dilation, self.groups)
