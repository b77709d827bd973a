"""The integer operators in a graph whose weights inductor freezes: its own oneDNN operators.

Inductor lays a constant weight out once, while it compiles, and merges bias, activation function and residual addition
into the operator that follows. That is faster than our opaque operators, and possible only where freezing happens
(``torch._inductor.config.freezing``, a CPU, no gradients); everywhere else the weight would be laid out at every call.

Scale and zero point stay tensors computed from the graph's own timestep, so nothing that depends on t is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from dq_torchao.kernels import onednn, operators
from dq_torchao.kernels.packing import StoredWeight

_WEIGHT = "Tensor weight, int[] shape, int bits, bool signs, Tensor? zero_point, Tensor? group_scale"
_WINDOW = "int[] stride, int[] padding, int[] dilation, int groups, int[] transposed, int[] input_shape"
_FLOATING_RESULT = (1.0, 0)  # its scale and zero point
_NO_POST_OP = ("none", [], "")

torch.library.define("dq_torchao::linear_layout", f"({_WEIGHT}) -> Tensor")
torch.library.define("dq_torchao::no_zero_points", "(Tensor weight_scale) -> Tensor")
torch.library.define("dq_torchao::conv2d_layout", f"({_WEIGHT}, Tensor weight_scale, {_WINDOW}) -> Tensor")


def is_frozen(device: torch.device) -> bool:
    """Whether what is being traced now is compiled with its weights frozen."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return device.type == "cpu" and inductor_config.freezing and not torch.is_grad_enabled()


torch.library.impl("dq_torchao::linear_layout", "CPU")(onednn.linear_layout)
torch.library.impl("dq_torchao::conv2d_layout", "CPU")(onednn.conv2d_layout)


def _no_zero_points(weight_scale: Tensor) -> Tensor:
    """`onednn.no_zero_points` as something that is frozen: made of a constant, not by a loop of the graph."""
    return torch.zeros_like(weight_scale, dtype=torch.int64)


torch.library.impl("dq_torchao::no_zero_points", "CPU")(_no_zero_points)
torch.library.register_fake("dq_torchao::no_zero_points")(_no_zero_points)


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
    layout = torch.ops.dq_torchao.linear_layout(*weight)
    weights = (layout, weight_scale, torch.ops.dq_torchao.no_zero_points(weight_scale), bias)
    return torch.ops.onednn.qlinear_pointwise.tensor(
        codes, scale, zero_point, *weights, *_FLOATING_RESULT, dtype, *_NO_POST_OP
    )


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
    layout = torch.ops.dq_torchao.conv2d_layout(*weight, weight_scale, *window, transposed, list(codes.shape))
    weights = (layout, weight_scale, torch.ops.dq_torchao.no_zero_points(weight_scale), bias)
    return torch.ops.onednn.qconv_pointwise.tensor(
        codes, scale, zero_point, *weights, *window, *_FLOATING_RESULT, dtype, *_NO_POST_OP
    )
