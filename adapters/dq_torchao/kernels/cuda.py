"""The integer operators on NVIDIA GPUs: one Triton implicit GEMM, int8 x int8 -> int32, for both.

A convolution is a matrix product whose left operand is gathered from the image while it runs (no im2col in memory):

    rows  m = (image, y, x) of the output      [M = N H' W']
    cols  n = output channel                   [O]
    inner k = (row, column of the window, c)   [h w C], channel fastest, so that loads are contiguous

A linear layer is the same with a 1 x 1 image. Borders read the code of zero, the zero point. Afterwards
``s s_w (sum q w - z sum w) + b`` is computed on the int32 sums before they leave the registers. Scale and zero point
are read from device memory: no host synchronisation, and CUDA graphs replay with the timestep's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from dq_torchao.kernels.operators import Kernel, empty_conv2d_output
from dq_torchao.kernels.packing import PackedWeights, unpack_codes
from dq_torchao.kernels.phases import conv2d_codes

_PACKED = PackedWeights()
_NO_WINDOW = ((1, 1), (0, 0), (1, 1))


def kernel(operator: str) -> Kernel:
    """The Triton kernel of ``operator``, or what keeps it from running here."""
    if find_spec("triton") is None:
        return Kernel("", "", "the GPU kernels are written in Triton, and it is not installed")
    return Kernel(f"triton implicit GEMM ({operator})", "int8 x int8 -> int32")


def _packed(
    weight: Tensor,
    shape: list[int],
    bits: int,
    signs: bool,
    zero_point: Tensor | None,
    group_scale: Tensor | None,
    groups: int = 1,
    transposed: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Weight codes ``[O, h w C]`` with the channel fastest, and their int32 sum ``[O]``."""

    def pack() -> tuple[Tensor, Tensor]:
        stored = (bits, signs, zero_point, group_scale)
        plain = conv2d_codes(lambda shape: unpack_codes(weight, shape, *stored), shape, groups, transposed)
        channel_last = plain.permute(0, 2, 3, 1) if plain.dim() == 4 else plain
        matrix = channel_last.reshape(shape[0], -1).contiguous()
        return matrix, matrix.sum(1, dtype=torch.int32)

    return _PACKED.get(weight, "channel fastest", pack)


@torch.library.impl("dq_torchao::int8_linear", "CUDA")
def _linear(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_shape: list[int],
    weight_bits: int,
    weight_signs: bool,
    weight_zero_point: Tensor | None,
    weight_group_scale: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    from dq_torchao.kernels.triton_gemm import implicit_gemm

    image = codes.reshape(-1, 1, 1, codes.shape[-1]).contiguous()
    y = codes.new_empty((*codes.shape[:-1], weight_shape[0]), dtype=dtype)
    view = y.view(-1, 1, 1, weight_shape[0])
    matrix = _packed(weight, weight_shape, weight_bits, weight_signs, weight_zero_point, weight_group_scale)
    implicit_gemm(image, view, scale, zero_point, *matrix, weight_scale, bias, (1, 1), *_NO_WINDOW)
    return y


@torch.library.impl("dq_torchao::int8_conv2d", "CUDA")
def _conv2d(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_shape: list[int],
    weight_bits: int,
    weight_signs: bool,
    weight_zero_point: Tensor | None,
    weight_group_scale: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: list[int],
    dtype: torch.dtype,
) -> Tensor:
    from dq_torchao.kernels.triton_gemm import implicit_gemm

    y = empty_conv2d_output(codes, weight_shape, stride, padding, dilation, dtype)
    image, output = codes.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)  # channels last in memory: plain NHWC views
    stored = (weight, weight_shape, weight_bits, weight_signs, weight_zero_point, weight_group_scale)
    matrix, code_sum = _packed(*stored, groups, transposed)
    inputs, outputs = codes.shape[1] // groups, weight_shape[0] // groups
    for group in range(groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        implicit_gemm(
            image[..., group * inputs : (group + 1) * inputs],
            output[..., rows],
            scale,
            zero_point,
            matrix[rows],
            code_sum[rows],
            weight_scale[rows],
            None if bias is None else bias[rows],
            (weight_shape[2], weight_shape[3]),
            stride,
            padding,
            dilation,
        )
    return y


def prepacked_bytes(weight: Tensor) -> int:
    """Bytes that the forms of a packed weight take which the kernels hold."""
    return sum(tensor.nbytes for layout in _PACKED.layouts(weight) for tensor in layout)
