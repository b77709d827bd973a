"""Linear layers and convolutions on codes by a kernel of ours, where there is a compiler; oneDNN's otherwise.

On one core of an EPYC (Zen 4), at the large shapes of two denoisers of 40 and 50 M parameters, ours was 8 to 26 %
faster (interleaved, CPU time), up to 97 % of what the processor can multiply in int8.
It is one operator, opaque to ``torch.compile``; frozen graphs hold its layout of the weight as a constant.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dq_torchao.kernels import native
from dq_torchao.kernels.operators import empty_conv2d_output
from dq_torchao.kernels.panels import WORD

_WINDOW = "int[] kernel, int[] stride, int[] padding, int[] dilation"
torch.library.define(
    "dq_torchao::product",
    "(Tensor codes, Tensor scale, Tensor zero_point, Tensor panels, Tensor sums, Tensor weight_scale, Tensor? bias, "
    f"{_WINDOW}) -> Tensor",
    tags=(torch.Tag.needs_exact_strides,),
)
OWN_KERNEL = "dq_torchao.product"
"""Its name in reports."""
LINEAR: tuple[tuple[int, ...], ...] = ((), (), (), ())
"""The window of a linear layer."""


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernel runs on this processor; a compiler takes it for a constant."""
    return not native.why_not()


def takes(dtype: torch.dtype, bias: Tensor | None) -> bool:
    """Whether the kernel makes results of ``dtype``, with this bias."""
    return dtype == torch.float32 and (bias is None or bias.dtype == torch.float32) and available()


def takes_conv2d(shape: Sequence[int], groups: int, transposed: Sequence[int]) -> bool:
    """Whether the kernel takes a convolution with a weight of this shape.

    Args:
        shape: ``[O, C, h, w]``.
        groups: of its channels.
        transposed: see `dq_torchao.kernels.operators`.
    """
    return groups == 1 and not transposed and shape[1] % WORD == 0


def product(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    panels: Tensor,
    sums: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """``s s_w (sum_k (q - z) w) + b``, float32.

    Args:
        codes: uint8 ``[..., K]``, or ``[N, C, H, W]``, C a multiple of four.
        scale: float32 ``[1]``.
        zero_point: int32 ``[1]``, of the stored codes.
        panels: of the weight.
        sums: int32 ``[O]``, of its codes.
        weight_scale: float32 ``[O]``.
        bias: float32 ``[O]`` or None.
        kernel: size of a convolution's; empty for a linear layer, as the rest of the window.
        stride: likewise.
        padding: likewise, in codes of zero.
        dilation: likewise.

    Returns:
        ``[..., O]``, or ``[N, O, H', W']``, channels last.
    """
    if kernel:
        codes = codes.contiguous(memory_format=torch.channels_last)
        y = empty_conv2d_output(codes, (len(sums), 0, *kernel), stride, padding, dilation, torch.float32)
        samples, channels, height, width = codes.shape
        image = (samples, height, width, channels, len(sums), y.shape[2], y.shape[3])
        window = (*kernel, *stride, *padding, *dilation)
    else:
        codes = codes.contiguous()
        y = codes.new_empty((*codes.shape[:-1], len(sums)), dtype=torch.float32)
        codes = F.pad(codes, (0, -codes.shape[-1] % WORD)) if codes.shape[-1] % WORD else codes
        rows = codes.numel() // max(codes.shape[-1], 1)
        image = (1, 1, rows, codes.shape[-1], len(sums), 1, rows)
        window = (1, 1, 1, 1, 0, 0, 1, 1)
    if y.numel():
        weight_scale, bias = weight_scale.contiguous(), None if bias is None else bias.contiguous()
        pointers = (codes, panels, sums, weight_scale, bias, scale, zero_point, y)
        job = _ProductJob(
            *[0 if x is None else x.data_ptr() for x in pointers], *image, window, torch.get_num_threads()
        )
        if not native.library().dq_product(ctypes.byref(job)):
            raise MemoryError("no memory for the border of an image")
    return y


torch.library.impl("dq_torchao::product", "CPU")(product)


@torch.library.register_fake("dq_torchao::product")
def _(codes: Tensor, scale, zero_point, panels, sums: Tensor, weight_scale, bias, kernel, stride, padding, dilation):
    if kernel:
        return empty_conv2d_output(codes, (len(sums), 0, *kernel), stride, padding, dilation, torch.float32)
    return codes.new_empty((*codes.shape[:-1], len(sums)), dtype=torch.float32)


class _ProductJob(ctypes.Structure):
    """As in product.cpp."""

    _fields_ = [  # what ctypes reads
        *((name, ctypes.c_void_p) for name in ("codes", "panels", "sums", "weight_scale", "bias")),
        *((name, ctypes.c_void_p) for name in ("scale", "zero_point", "output")),
        *((name, ctypes.c_int64) for name in ("samples", "height", "width", "channels", "outputs", "rows", "columns")),
        ("window", ctypes.c_int64 * 8),  # kernel, stride, padding, dilation
        ("threads", ctypes.c_int32),
    ]
