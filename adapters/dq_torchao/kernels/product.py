"""Linear layers and convolutions on codes by a kernel of ours, where there is a compiler; oneDNN's otherwise.

On one core of an EPYC (Zen 4), at the large shapes of two denoisers of 40 and 50 M parameters, ours was 8 to 26 %
faster (interleaved, CPU time), up to 97 % of what the processor can multiply in int8.
In graphs it is one operator, opaque to ``torch.compile`` (`dq_torchao.kernels.graphs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

import torch
from torch import Tensor
from torch.nn import functional as F

from dq_plugins.affine import SMALLEST_SCALE, integer_range
from dq_torchao.kernels import native
from dq_torchao.kernels.codes import code_offset, width_and_clip
from dq_torchao.kernels.operators import empty_conv2d_output
from dq_torchao.kernels.panels import COLUMNS, WORD

OWN_KERNEL = "dq_torchao.product"
"""Its name in reports."""
ACTIVATIONS = {"": 0, "tanh": 1, "none": 2, "gated tanh": 5, "gated none": 6}
"""What is done to the results: nothing, or GELU of either form; gated: the first half times GELU of the second."""
GATED_OUTPUTS = 2 * COLUMNS
"""Gated results are a multiple of these."""
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
    activation: str = "",
    next_factor: Tensor | None = None,
    next_zero: Tensor | None = None,
    next_bits: int = 8,
) -> Tensor:
    """``s s_w (sum_k (q - z) w) + b``, float32; then an activation function, then the codes of the next layer's input.

    Args:
        codes: uint8 ``[..., K]``, or ``[N, C, H, W]``, C a multiple of four.
        scale: float32 ``[1]``, or ``[R]``: of runs of rows of the result, all of one length.
        zero_point: int32, likewise, of the stored codes.
        panels: of the weight.
        sums: int32 ``[O]``, of its codes.
        weight_scale: float32 ``[O]``.
        bias: float32 ``[O]`` or None.
        kernel: size of a convolution's; empty for a linear layer, as the rest of the window.
        stride: likewise.
        padding: likewise, in codes of zero: of a sample's first row.
        dilation: likewise.
        activation: one of `ACTIVATIONS`.
        next_factor: float32 ``[1]``, or one for each output that is left, see `dq_torchao.kernels.codes`, or None.
        next_zero: int32 ``[1]``, of the stored codes.
        next_bits: their width.

    Returns:
        ``[..., O]``, or ``[N, O, H', W']``, channels last; uint8 where it is codes; half as many outputs where gated.

    Raises:
        MemoryError: for the border of an image.
        ValueError: gated outputs that are no multiple of `GATED_OUTPUTS`, or scales that do not share out the rows.
    """
    layer = panels, sums, weight_scale, bias
    window = kernel, stride, padding, dilation
    return _multiplied(codes, scale, zero_point, layer, window, activation, (next_factor, next_zero, next_bits))


def product_dynamic_codes(
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
    activation: str,
    factor: Tensor | None,
    bits: int,
    symmetric: bool,
    clip: float,
    *,
    form: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`product` of a linear layer, and of every row the codes by its own range (`kernels.dynamic_codes`).

    Args:
        codes: and so on, see `product`.
        factor: float32, one for each output that is left, or None.
        bits: width of the codes.
        symmetric: whether the zero point of the signed codes is 0.
        clip: share of the extremes at which values are cut off.
        form: largest code and clip, float32 ``[2]``, in place of those above: they depend on the timestep.

    Returns:
        codes, uint8 ``[..., O]``; their scale, float32, and zero point of the stored codes, int32, ``[..., 1]``.
    """
    bits, clip = (bits, clip) if form is None else width_and_clip(form)
    own = torch.empty((*codes.shape[:-1], 1)), torch.empty((*codes.shape[:-1], 1), dtype=torch.int32)
    layer = panels, sums, weight_scale, bias
    window = kernel, stride, padding, dilation
    y = _multiplied(codes, scale, zero_point, layer, window, activation, (factor, None, bits), (*own, symmetric, clip))
    return y, *own


def _multiplied(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    layer: tuple[Tensor, Tensor, Tensor, Tensor | None],
    window: tuple[Sequence[int], ...],
    activation: str,
    then: tuple[Tensor | None, Tensor | None, int],
    own: tuple[Tensor, Tensor, bool, float] | None = None,
) -> Tensor:
    panels, sums, weight_scale, bias = layer
    kernel, stride, padding, dilation = window
    outputs = sums.shape[0]
    written = written_outputs(outputs, activation)
    if then[0] is not None:
        then = then[0].contiguous(), *then[1:]
    dtype = torch.float32 if then[0] is None and own is None else torch.uint8
    if kernel:
        codes = codes.contiguous(memory_format=torch.channels_last)
        y = empty_conv2d_output(codes, (written, 0, *kernel), stride, padding, dilation, dtype)
        samples, channels, height, width = codes.shape
        image = (samples, height, width, channels, outputs, y.shape[2], y.shape[3])
        taps = (*kernel, *stride, *padding, *dilation)
    else:
        codes = codes.contiguous()
        size = codes.shape
        y = torch.empty((*size[:-1], written), dtype=dtype)
        channels = size[-1]
        if channels % WORD:
            codes = F.pad(codes, (0, -channels % WORD))
            channels += -channels % WORD
        rows = codes.numel() // max(channels, 1)
        image = (1, 1, rows, channels, outputs, 1, rows)
        taps = _ONE_TAP
    if written != outputs and outputs % GATED_OUTPUTS:
        raise ValueError(f"{outputs} gated outputs are no multiple of {GATED_OUTPUTS}")
    total = y.numel()
    if total:
        run = _run(total // written, scale, zero_point)
        after = _NO_CODES if dtype is torch.float32 else _codes_after(then, own)
        # alive until the kernel has read them
        scale, zero_point, weight_scale = scale.contiguous(), zero_point.contiguous(), weight_scale.contiguous()
        bias = None if bias is None else bias.contiguous()
        job = _JOB.pack(
            codes.data_ptr(), panels.data_ptr(), sums.data_ptr(), weight_scale.data_ptr(), native.address(bias),
            scale.data_ptr(), zero_point.data_ptr(), y.data_ptr(), *image, *taps, torch.get_num_threads(),
            ACTIVATIONS[activation], run, *after,
        )  # fmt: skip
        if not native.library().dq_product(job):
            raise MemoryError("no memory for the border of an image, or for rows that wait for their ranges")
    return y


def _codes_after(
    then: tuple[Tensor | None, Tensor | None, int], own: tuple[Tensor, Tensor, bool, float] | None
) -> tuple[float, ...]:
    factor, zero, bits = then
    low, high = integer_range(bits)
    offset = code_offset(_CPU)
    one = int(factor is not None and factor.numel() == 1)
    ranges = (0, 0, 0) if own is None else (own[0].data_ptr(), own[1].data_ptr(), int(own[2]))
    given = zero if own is None else None
    ends, form = (low + offset, high + offset), (low, high, offset, SMALLEST_SCALE, 1.0 if own is None else own[3])
    return native.address(factor), native.address(given), one, *ends, *ranges, *form


def _run(rows: int, scale: Tensor, zero_point: Tensor) -> int:
    """Rows that share a scale, 0: all."""
    runs = scale.numel()
    if zero_point.numel() != runs or rows % runs:
        raise ValueError(f"{rows} rows, {runs} scales and {zero_point.numel()} zero points")
    return 0 if runs == 1 else rows // runs


def written_outputs(outputs: int, activation: str) -> int:
    """How many of its outputs a product writes."""
    return outputs // 2 if activation.startswith("gated") else outputs


_ONE_TAP = (1, 1, 1, 1, 0, 0, 1, 1)
_CPU = torch.device("cpu")
_NO_CODES = (0,) * 11 + (0.0, 1.0)
_JOB = Struct("37q2d")
"""The fields of a job in product.cpp: 8 pointers, 7 sizes, the window of 8, threads, activation, run, codes (11), and
the smallest scale."""
