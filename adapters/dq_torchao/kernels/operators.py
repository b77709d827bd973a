"""The two integer operators: schemas and shapes.

They are PyTorch custom operators, opaque to ``torch.compile``. Inductor fuses the quantization of the input into
whatever produced it and calls the operator as it is: with freezing or without, in a whole graph or in a region, it
cannot fall back to floating point and it cannot fold a scale that changes with the timestep.

They take the weight as it is stored, packed (`dq_plugins.quantized.packing`), with its shape, its width, whether its
codes are signs, and its zero points and group scales if it has any. A kernel unpacks and rearranges it at the first
call, less the zero points and times the group scales, and keeps that form only.

Convolutions over one or three dimensions, and transposed ones, are 2-d convolutions of another view of the image
(`dq_torchao.planes`). The weight of a transposed one is laid out anew: ``transposed`` then holds its shape as it is
stored, its stride and its dilation, and ``weight_shape`` is that of the 2-d convolution; else it is empty.

Shapes: activation codes ``[N, ..., K]`` or ``[N, C, H, W]``; packed weight uint8 ``[bytes]`` of codes ``[O, K]`` or
``[O, C/groups, h, w]``; scale float32 and zero point int32 ``[1]`` (the zero point of the stored codes, offset
included), for the kernel of `dq_torchao.kernels.product` also ``[R]``, of tokens or of samples; weight scale float32
``[O]``; bias ``[O]`` or None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WEIGHT = "Tensor weight, int[] weight_shape, int weight_bits, bool weight_signs, Tensor? weight_zero_point"
WEIGHT += ", Tensor? weight_group_scale"
_COMMON = f"Tensor codes, Tensor scale, Tensor zero_point, {WEIGHT}, Tensor weight_scale, Tensor? bias"
_WINDOW = "int[] stride, int[] padding, int[] dilation, int groups, int[] transposed"

# Exact strides: the convolutions want channels-last codes, and inductor would otherwise choose a layout itself.
torch.library.define(
    "dq_torchao::int8_linear", f"({_COMMON}, ScalarType dtype) -> Tensor", tags=(torch.Tag.needs_exact_strides,)
)
torch.library.define(
    "dq_torchao::int8_conv2d",
    f"({_COMMON}, {_WINDOW}, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.needs_exact_strides,),
)
torch.library.define("dq_torchao::weight_code_sum", f"({WEIGHT}) -> Tensor")

int8_linear = torch.ops.dq_torchao.int8_linear.default
int8_conv2d = torch.ops.dq_torchao.int8_conv2d.default
weight_code_sum = torch.ops.dq_torchao.weight_code_sum.default


class Kernel(NamedTuple):
    """What runs an operator on a device; ``unsupported_reason`` says why nothing does."""

    name: str
    compute: str
    unsupported_reason: str = ""


@torch.library.register_fake("dq_torchao::int8_linear")
def _(
    codes: Tensor,
    scale,
    zero_point,
    weight,
    shape,
    bits,
    signs,
    weight_zero_point,
    weight_group_scale,
    weight_scale,
    bias,
    dtype,
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], shape[0]), dtype=dtype)


@torch.library.register_fake("dq_torchao::int8_conv2d")
def _(
    codes, scale, zero_point, weight, shape, bits, signs, weight_zero_point, weight_group_scale, weight_scale, bias,
    stride, padding, dilation, groups, transposed, dtype,
) -> Tensor:  # fmt: skip
    return empty_conv2d_output(codes, shape, stride, padding, dilation, dtype)


@torch.library.register_fake("dq_torchao::weight_code_sum")
def _(weight: Tensor, shape, bits, signs, zero_point, group_scale) -> Tensor:
    return weight.new_empty(shape[0], dtype=torch.int32)


def empty_conv2d_output(
    codes: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Memory for the result of a convolution: ``[N, O, H', W']``, channels last."""
    size = [
        (codes.shape[d + 2] + 2 * padding[d] - dilation[d] * (weight_shape[d + 2] - 1) - 1) // stride[d] + 1
        for d in range(2)
    ]
    shape = (codes.shape[0], weight_shape[0], *size)
    return torch.empty(shape, dtype=dtype, device=codes.device, memory_format=torch.channels_last)
