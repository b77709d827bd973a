"""The integer operators on x86 CPUs: oneDNN's prepacked int8 linear and convolution, uint8 x int8 -> int32.

The kernels subtract the zero point themselves and treat padded borders as real zeros. What a kernel of ours takes goes
there (`dq_torchao.kernels.product`): it is faster.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from dq_plugins.errors import DQError
from dq_torchao.kernels.operators import Kernel
from dq_torchao.kernels.packing import PackedWeights, unpack_codes
from dq_torchao.kernels.panels import Panels, panels, plain
from dq_torchao.kernels.phases import conv2d_codes
from dq_torchao.kernels.product import LINEAR, product, takes, takes_conv2d

_PACKED = PackedWeights()
_NO_POST_OP = ("none", [], "")


def kernel(operator: str) -> Kernel:
    """The oneDNN kernel of ``operator``, or what keeps it from running here."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return Kernel("", "", "this build of PyTorch has no oneDNN int8 kernels for this processor")
    if not torch.cpu._is_vnni_supported():
        return Kernel("", "", "this processor has no VNNI instructions, without which int8 products saturate")
    name = {"linear": "onednn.qlinear_pointwise", "conv2d": "onednn.qconv_pointwise"}[operator]
    return Kernel(name, "uint8 x int8 -> int32")


def plain_codes(
    weight: Tensor,
    shape: Sequence[int],
    bits: int,
    signs: bool,
    zero_point: Tensor | None,
    group_scale: Tensor | None,
) -> Tensor:
    """Codes of `unpack_codes`: from the packed form of a weight, or of a released one from a layout.

    Raises:
        DQError: the weight was released, and this is not the tensor that stands for it.
    """
    if weight.numel() or not prod(shape):
        return unpack_codes(weight, shape, bits, signs, zero_point, group_scale)
    layout = next(_PACKED.layouts(weight), None)
    if layout is None:
        raise DQError(
            "a layer's packed weight was released (dq_torchao.release_weights), so its weight can be laid out only "
            "where it has run before; call dq_torchao.restore_weights(model) before you copy single tensors of it"
        )
    if isinstance(layout, Panels):
        return plain(layout.panels, layout.shape).reshape(tuple(shape))
    dense = layout[0].to_dense()
    return dense.t().contiguous() if len(shape) == 2 else dense.reshape(tuple(shape))


def release(weight: Tensor) -> Tensor | None:
    """An empty tensor that stands for a packed weight whose layouts are held; None if there are none yet."""
    if next(_PACKED.layouts(weight), None) is None:
        return None
    stand_in = weight.new_empty((1, 1))[:0]  # inductor makes others of what has one dimension, or no memory
    _PACKED.share(weight, stand_in)
    return stand_in


def no_zero_points(outputs: int) -> Tensor:
    """What the kernels want for the zero points of a laid-out weight, from which its own are subtracted already."""
    return torch.zeros(outputs, dtype=torch.int64)


def linear_layout(
    weight: Tensor,
    shape: list[int],
    bits: int,
    signs: bool,
    zero_point: Tensor | None,
    group_scale: Tensor | None,
) -> Tensor:
    """A packed weight in the layout of the linear kernel."""
    return torch.ops.onednn.qlinear_prepack(plain_codes(weight, shape, bits, signs, zero_point, group_scale), None)


def conv2d_layout(
    weight: Tensor,
    shape: list[int],
    bits: int,
    signs: bool,
    zero_point: Tensor | None,
    group_scale: Tensor | None,
    weight_scale: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: list[int],
    input_shape: list[int],
) -> Tensor:
    """A packed weight in the layout of the convolution kernel for inputs of one shape."""
    stored = (bits, signs, zero_point, group_scale)
    codes = conv2d_codes(lambda shape: plain_codes(weight, shape, *stored), shape, groups, transposed)
    # 128: any zero point but 0, which tells oneDNN to keep the sums it needs to subtract one.
    window = (stride, padding, dilation, groups)
    return torch.ops.onednn.qconv_prepack(codes, weight_scale, 1.0, 128, *window, input_shape)


def in_panels(
    weight: Tensor,
    shape: list[int],
    bits: int,
    signs: bool,
    zero_point: Tensor | None,
    group_scale: Tensor | None,
) -> Panels:
    """A packed weight as the product of ours takes it, made once."""

    def pack() -> Panels:
        codes = plain_codes(weight, shape, bits, signs, zero_point, group_scale)
        return Panels(panels(codes), codes.flatten(1).sum(1, dtype=torch.int32), tuple(shape))

    return _PACKED.get(weight, ("panels", *shape), pack)


@torch.library.impl("dq_torchao::int8_linear", "CPU")
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
    stored = (weight, weight_shape, weight_bits, weight_signs, weight_zero_point, weight_group_scale)
    if takes(dtype, bias):
        laid_out = in_panels(*stored)
        return product(codes, scale, zero_point, laid_out.panels, laid_out.sums, weight_scale, bias, *LINEAR)

    def pack() -> tuple[Tensor, Tensor]:
        return linear_layout(*stored), no_zero_points(weight_shape[0])

    layout, zeros = _PACKED.get(weight, "linear", pack)
    quantized = (codes.contiguous(), scale, zero_point, layout, weight_scale, zeros)
    y = torch.ops.onednn.qlinear_pointwise.tensor(*quantized, bias, 1.0, 0, dtype, *_NO_POST_OP)
    return y if y.numel() else y.new_empty((*codes.shape[:-1], weight_shape[0]))  # it flattens an empty batch


@torch.library.impl("dq_torchao::int8_conv2d", "CPU")
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
    shape = list(codes.shape)
    stored = (weight, weight_shape, weight_bits, weight_signs, weight_zero_point, weight_group_scale)
    if takes(dtype, bias) and takes_conv2d(weight_shape, groups, transposed):
        window = (weight_shape[2:], stride, padding, dilation)
        laid_out = in_panels(*stored)
        return product(codes, scale, zero_point, laid_out.panels, laid_out.sums, weight_scale, bias, *window)
    window = (stride, padding, dilation, groups)

    def pack() -> tuple[Tensor, Tensor]:
        return conv2d_layout(*stored, weight_scale, *window, transposed, shape), no_zero_points(weight_shape[0])

    layout, zeros = _PACKED.get(weight, tuple(shape), pack)
    quantized = (codes, scale, zero_point, layout, weight_scale, zeros)
    return torch.ops.onednn.qconv_pointwise.tensor(*quantized, bias, *window, 1.0, 0, dtype, *_NO_POST_OP)


def prepacked_bytes(weight: Tensor) -> int:
    """Bytes that the forms of a packed weight take which the kernels hold."""
    held = [each for layout in _PACKED.layouts(weight) for each in layout if isinstance(each, Tensor)]
    return sum(torch.ops.mkldnn._nbytes(t) if t.is_mkldnn else t.nbytes for t in held)
