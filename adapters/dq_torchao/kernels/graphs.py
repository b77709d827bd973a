"""The integer operators in a graph that is compiled for inference on a CPU.

There a product is an operator of its own, into which a pass of inductor's merges what lies around it
(`dq_torchao.kernels.merging`). It takes the weight as layers store it, and looks up how the kernel wants it laid out:
what eager calls have laid out serves graphs, too, and nothing depends on weights being frozen
(``torch._inductor.config.freezing``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dq_torchao.kernels import operators
from dq_torchao.kernels.onednn import in_panels
from dq_torchao.kernels.operators import WEIGHT, empty_conv2d_output
from dq_torchao.kernels.packing import StoredWeight
from dq_torchao.kernels.product import LINEAR, product, product_dynamic_codes, takes, takes_conv2d, written_outputs
from dq_torchao.kernels.tracing import is_merged

_OPERANDS = f"Tensor codes, Tensor scale, Tensor zero_point, {WEIGHT}, Tensor weight_scale, Tensor? bias, "
_OPERANDS += "int[] kernel, int[] stride, int[] padding, int[] dilation"
torch.library.define(
    "dq_torchao::product",
    f"({_OPERANDS}, str activation='', Tensor? next_factor=None, Tensor? next_zero=None, int next_bits=8) -> Tensor",
    tags=(torch.Tag.needs_exact_strides,),
)
torch.library.define(
    "dq_torchao::product_dynamic_codes",
    f"({_OPERANDS}, str activation, Tensor? factor, int bits, bool symmetric, float clip, *, Tensor? form=None) -> "
    "(Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides,),
)
traced_product = torch.ops.dq_torchao.product.default
PLAIN = 15
"""Arguments of a product that nothing follows."""


def _of_stored_weight(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel with a weight as layers store it, six arguments, in place of panels and sums."""

    def run(codes: Tensor, scale: Tensor, zero_point: Tensor, *rest: Any, **more: Any) -> Any:
        laid_out = in_panels(*rest[:6])
        return kernel(codes, scale, zero_point, laid_out.panels, laid_out.sums, *rest[6:], **more)

    return run


torch.library.impl("dq_torchao::product", "CPU")(_of_stored_weight(product))
torch.library.impl("dq_torchao::product_dynamic_codes", "CPU")(_of_stored_weight(product_dynamic_codes))


@torch.library.register_fake("dq_torchao::product")
def _(
    codes: Tensor, scale, zero_point, weight, shape, bits, signs, weight_zero_point, weight_group_scale, weight_scale,
    bias, kernel, stride, padding, dilation, activation="", next_factor=None, next_zero=None, next_bits=8,
) -> Tensor:  # fmt: skip
    dtype = torch.float32 if next_factor is None else torch.uint8
    written = written_outputs(shape[0], activation)
    if kernel:
        return empty_conv2d_output(codes, (written, 0, *kernel), stride, padding, dilation, dtype)
    return codes.new_empty((*codes.shape[:-1], written), dtype=dtype)


@torch.library.register_fake("dq_torchao::product_dynamic_codes")
def _(
    codes: Tensor, scale, zero_point, weight, shape, bits, signs, weight_zero_point, weight_group_scale, weight_scale,
    bias, kernel, stride, padding, dilation, activation, factor, next_bits, symmetric, clip, *, form=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = codes.shape[:-1]
    own = codes.new_empty((*rows, 1), dtype=torch.float32), codes.new_empty((*rows, 1), dtype=torch.int32)
    return codes.new_empty((*rows, written_outputs(shape[0], activation))), *own


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
    if is_merged(codes.device) and takes(dtype, bias):
        return traced_product(codes, scale, zero_point, *weight, weight_scale, bias, *LINEAR)
    return operators.int8_linear(codes, scale, zero_point, *weight, weight_scale, bias, dtype)


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
    codes = codes.contiguous(memory_format=torch.channels_last)
    operands = codes, scale, zero_point, *weight, weight_scale, bias
    if is_merged(codes.device) and takes(dtype, bias) and takes_conv2d(weight[1], groups, transposed):
        return traced_product(*operands, list(weight[1][2:]), stride, padding, dilation)
    return operators.int8_conv2d(*operands, stride, padding, dilation, groups, transposed, dtype)
