"""The Triton kernel behind `dq_torchao.kernels.cuda`. Import it only where Triton is there.

It runs on a GPU, or, where TRITON_INTERPRET was set before this file was imported, on a CPU in Triton's interpreter.

Shapes: image ``[N, H, W, C]`` and output ``[N, H', W', O]``, channel stride 1; weight matrix ``[O, h w C]`` contiguous.
"""

# ruff: noqa: N803  (compile-time constants of a Triton kernel are upper case)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton  # pyrefly: ignore [missing-import]  # not part of CPU builds
import triton.language as tl  # pyrefly: ignore [missing-import]
from torch import Tensor


def _config(rows: int, outputs: int, inner: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BM": rows, "BN": outputs, "BK": inner}, num_warps=warps, num_stages=stages)


CONFIGS = [
    _config(128, 128, 64, 8, 3),
    _config(128, 128, 128, 8, 3),
    _config(128, 64, 64, 4, 4),
    _config(64, 128, 64, 4, 4),
    _config(64, 64, 128, 4, 4),
    _config(32, 64, 64, 4, 4),
    _config(16, 64, 128, 4, 4),
]


@triton.autotune(configs=CONFIGS, key=["rows", "outputs", "channels", "KH", "KW"])
@triton.jit
def _kernel(
    image, matrix, output, scale, zero_point, code_sum, weight_scale, bias,  # pointers
    rows, outputs, channels, height, width, out_height, out_width,
    image_n, image_h, image_w, output_n, output_h, output_w,  # element strides
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    KH: tl.constexpr, KW: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One ``[BM, BN]`` tile of the output."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    sample = m // (out_height * out_width)
    y = m // out_width % out_height
    x = m % out_width
    z = tl.load(zero_point)
    border = z.to(tl.int8)

    chunks = tl.cdiv(channels, BK)
    sums = tl.zeros((BM, BN), dtype=tl.int32)
    for step in range(KH * KW * chunks):
        tap = step // chunks
        c = (step % chunks) * BK + tl.arange(0, BK)
        row = y * stride_h - pad_h + (tap // KW) * dilation_h
        col = x * stride_w - pad_w + (tap % KW) * dilation_w
        inside = (m < rows) & (row >= 0) & (row < height) & (col >= 0) & (col < width)
        pixel = sample.to(tl.int64) * image_n + row * image_h + col * image_w
        mask = inside[:, None] & (c < channels)[None, :]
        a = tl.load(image + pixel[:, None] + c[None, :], mask=mask, other=0)
        a = tl.where(mask, a, border)  # beyond the last channel the weight is 0, so any code will do
        weight = matrix + n[None, :].to(tl.int64) * (KH * KW * channels) + (tap * channels + c)[:, None]
        b = tl.load(weight, mask=(n < outputs)[None, :] & (c < channels)[:, None], other=0)
        sums = tl.dot(a, b, acc=sums, out_dtype=tl.int32)

    inside_n = n < outputs
    centred = sums - z * tl.load(code_sum + n, mask=inside_n, other=0)[None, :]
    result = centred.to(tl.float32) * (tl.load(scale) * tl.load(weight_scale + n, mask=inside_n, other=0.0))[None, :]
    if HAS_BIAS:
        result += tl.load(bias + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    place = sample.to(tl.int64) * output_n + y * output_h + x * output_w
    kept = (m < rows)[:, None] & inside_n[None, :]
    tl.store(output + place[:, None] + n[None, :], result.to(output.dtype.element_ty), mask=kept)


def implicit_gemm(
    image: Tensor,
    output: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    matrix: Tensor,
    code_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    window: tuple[int, int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    config: triton.Config | None = None,
) -> None:
    """Convolve int8 ``image`` with int8 ``matrix`` into ``output``, rescaled; see the head of `kernels.cuda`.

    Args:
        image: codes ``[N, H, W, C]``, int8, channel stride 1.
        output: ``[N, H', W', O]``, floating, channel stride 1; written.
        scale: float32 ``[1]``, on the device.
        zero_point: int32 ``[1]``, on the device.
        matrix: weight codes ``[O, h w C]``, int8, contiguous.
        code_sum: int32 ``[O]``, sum of each row of ``matrix``.
        weight_scale: float32 ``[O]``.
        bias: ``[O]`` or None.
        window: ``(h, w)``.
        stride: of the window, ``(vertical, horizontal)``; likewise the rest.
        padding: zeros on each side.
        dilation: distance of the window's taps.
        config: sizes of tiles; by default those of `CONFIGS` that are fastest on this device, found at the first call.
    """
    _, height, width, channels = image.shape
    samples, out_height, out_width, outputs = output.shape
    rows = samples * out_height * out_width
    if rows == 0:
        return

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(rows, meta["BM"]), triton.cdiv(outputs, meta["BN"])

    kernel = _kernel if config is None else _kernel.fn
    with torch.cuda.device_of(image):
        kernel[grid](
            image, matrix, output, scale, zero_point, code_sum, weight_scale, bias if bias is not None else scale,
            rows, outputs, channels, height, width, out_height, out_width,
            image.stride(0), image.stride(1), image.stride(2),
            output.stride(0), output.stride(1), output.stride(2),
            *stride, *padding, *dilation,
            KH=window[0], KW=window[1], HAS_BIAS=bias is not None, **({} if config is None else config.kwargs),
        )  # fmt: skip
