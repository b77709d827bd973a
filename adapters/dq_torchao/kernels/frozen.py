"""The integer operators in a graph whose weights inductor freezes: the layout of the weight is a constant of the graph.

That is faster than our operators on packed weights, and possible only where freezing happens
(``torch._inductor.config.freezing``, a CPU, no gradients); everywhere else the weight would be laid out at every call.
What multiplies is a kernel of ours where it can (`dq_torchao.kernels.product`), else inductor's own oneDNN operators,
into which it merges the activation function or the residual addition that follows.

Scale and zero point stay tensors computed from the graph's own timestep, so nothing that depends on t is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from dq_torchao.kernels import onednn, operators
from dq_torchao.kernels.packing import StoredWeight
from dq_torchao.kernels.panels import COLUMNS, LANES, WORD
from dq_torchao.kernels.product import LINEAR, takes, takes_conv2d

_WEIGHT = "Tensor weight, int[] shape, int bits, bool signs, Tensor? zero_point, Tensor? group_scale"
_WINDOW = "int[] stride, int[] padding, int[] dilation, int groups, int[] transposed, int[] input_shape"
_FLOATING_RESULT = (1.0, 0)  # its scale and zero point
_NO_POST_OP = ("none", [], "")

torch.library.define("dq_torchao::panels", f"({_WEIGHT}) -> Tensor")
torch.library.define("dq_torchao::linear_layout", f"({_WEIGHT}) -> Tensor")
torch.library.define("dq_torchao::no_zero_points", "(Tensor weight_scale) -> Tensor")
torch.library.define("dq_torchao::conv2d_layout", f"({_WEIGHT}, Tensor weight_scale, {_WINDOW}) -> Tensor")


def is_frozen(device: torch.device) -> bool:
    """Whether what is being traced now is compiled with its weights frozen."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return device.type == "cpu" and inductor_config.freezing and not torch.is_grad_enabled()


# a copy: an operator may not hand out one tensor twice
torch.library.impl("dq_torchao::panels", "CPU")(lambda *weight: onednn.in_panels(*weight).panels.clone())
torch.library.impl("dq_torchao::linear_layout", "CPU")(onednn.linear_layout)
torch.library.impl("dq_torchao::conv2d_layout", "CPU")(onednn.conv2d_layout)


def _no_zero_points(weight_scale: Tensor) -> Tensor:
    """`onednn.no_zero_points` as something that is frozen: made of a constant, not by a loop of the graph."""
    return torch.zeros_like(weight_scale, dtype=torch.int64)


torch.library.impl("dq_torchao::no_zero_points", "CPU")(_no_zero_points)
torch.library.register_fake("dq_torchao::no_zero_points")(_no_zero_points)


@torch.library.register_fake("dq_torchao::panels")
def _(weight: Tensor, shape, bits, signs, zero_point, group_scale) -> Tensor:
    outputs, channels, *kernel = shape
    whole, rest = divmod(outputs, COLUMNS)
    columns = whole * COLUMNS + rest + -rest % LANES
    return weight.new_empty(columns * (channels + -channels % WORD) * prod(kernel), dtype=torch.int8)


@torch.library.register_fake("dq_torchao::linear_layout")
def _(weight: Tensor, shape, bits, signs, zero_point, group_scale) -> Tensor:
    return weight.new_empty((shape[1], shape[0]), dtype=torch.int8)


@torch.library.register_fake("dq_torchao::conv2d_layout")
def _(
    weight: Tensor, shape, bits, signs, zero_point, group_scale, weight_scale, stride, padding, dilation, groups,
    transposed, input_shape,
) -> Tensor:  # fmt: skip
    return weight.new_empty(shape, dtype=torch.int8)


def int8_linear(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: StoredWeight,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Linear layer on codes; see `dq_torchao.kernels.operators` for shapes."""
    if not is_frozen(codes.device):
        return operators.int8_linear(codes, scale, zero_point, *weight, weight_scale, bias, dtype)
    if takes(dtype, bias):
        return _product(codes, scale, zero_point, weight, weight_scale, bias, *LINEAR)
    layout = torch.ops.dq_torchao.linear_layout(*weight)
    weights = (layout, weight_scale, torch.ops.dq_torchao.no_zero_points(weight_scale), bias)
    return torch.ops.onednn.qlinear_pointwise.tensor(
        codes, scale, zero_point, *weights, *_FLOATING_RESULT, dtype, *_NO_POST_OP
    )


def _product(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: StoredWeight,
    weight_scale: Tensor,
    bias: Any,
    *window: Any,
) -> Tensor:
    laid_out = (torch.ops.dq_torchao.panels(*weight), operators.weight_code_sum(*weight))
    return torch.ops.dq_torchao.product(codes, scale, zero_point, *laid_out, weight_scale, bias, *window)


def int8_conv2d(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: StoredWeight,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Convolution on codes; see `dq_torchao.kernels.operators` for shapes."""
    window = (stride, padding, dilation, groups)
    if not is_frozen(codes.device):
        codes = codes.contiguous(memory_format=torch.channels_last)
        return operators.int8_conv2d(codes, scale, zero_point, *weight, weight_scale, bias, *window, transposed, dtype)
    if takes(dtype, bias) and takes_conv2d(weight[1], groups, transposed):
        codes = codes.contiguous(memory_format=torch.channels_last)
        own = (list(weight[1][2:]), list(stride), list(padding), list(dilation))
        return _product(codes, scale, zero_point, weight, weight_scale, bias, *own)
    layout = torch.ops.dq_torchao.conv2d_layout(*weight, weight_scale, *window, transposed, list(codes.shape))
    weights = (layout, weight_scale, torch.ops.dq_torchao.no_zero_points(weight_scale), bias)
    return torch.ops.onednn.qconv_pointwise.tensor(
        codes, scale, zero_point, *weights, *window, *_FLOATING_RESULT, dtype, *_NO_POST_OP
    )
