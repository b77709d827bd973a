"""Attention on codes behind one operator, ``dq_torchao::int8_attention``, opaque to ``torch.compile``.

Shapes: query ``[B, H, L, D]``, key ``[B, H', S, D]``, value ``[B, H', S, D']`` (H' divides H), mask broadcasting
against ``[B, H, L, S]``; scales float32 and zero points int32, of stored codes, ``[1]`` or ``[B]``.

An operand in uint8 is codes already, as `dq_torchao.kernels.codes` stores them. In a graph for inference all three are:
what made the values makes their codes, a product (`dq_torchao.kernels.merging`) or a loop of the compiler. With a next
factor the result is the codes of the next layer's input.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from dq_plugins.affine import integer_range
from dq_plugins.errors import DQError
from dq_torchao.kernels import native, onednn
from dq_torchao.kernels.codes import code_offset
from dq_torchao.kernels.operators import Kernel

KERNEL = Kernel("dq_torchao.attention", "uint8 x int8 -> int32")

_TABLES = ", ".join(f"Tensor {operand}_{part}" for operand in ("query", "key", "value") for part in ("scale", "zero"))
torch.library.define(
    "dq_torchao::int8_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float scale, "
    f"{_TABLES}, int bits, ScalarType dtype, "
    "Tensor? next_factor=None, Tensor? next_zero=None, int next_bits=8) -> Tensor",
)
int8_attention = torch.ops.dq_torchao.int8_attention.default
PLAIN = 14
"""Arguments of an attention that nothing follows."""


@cache
def cpu_kernel() -> Kernel:
    """The kernel of attention on this processor, built if it is not there yet, or what keeps it from running."""
    if reason := onednn.kernel("linear").unsupported_reason or native.why_not():
        return Kernel("", "", reason)
    try:
        q = torch.ones(1, 1, 1, 4)
        one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
        int8_attention(q, q, q, None, False, 1.0, one, zero, one, zero, one, zero, 8, q.dtype)
    except DQError as error:
        return Kernel("", "", str(error))
    return KERNEL


def attention_kernel(device: torch.device) -> Kernel:
    """The kernel that runs attention on ``device``."""
    if device.type != "cpu":
        return Kernel("", "", f"there is no integer attention for device type {device.type!r}")
    return cpu_kernel()


def output_like(query: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for the result, ``[B, H, L, D']``, heads of a token side by side as PyTorch's attention lays them out."""
    samples, heads, queries, _ = query.shape
    return query.new_empty((samples, queries, heads, value.shape[-1]), dtype=dtype).transpose(1, 2)


@torch.library.register_fake("dq_torchao::int8_attention")
def _(
    query: Tensor, key, value: Tensor, mask, is_causal, scale, query_scale, query_zero, key_scale, key_zero,
    value_scale, value_zero, bits, dtype: torch.dtype, next_factor: Tensor | None = None, next_zero=None, next_bits=8,
) -> Tensor:  # fmt: skip
    return output_like(query, value, dtype if next_factor is None else torch.uint8)


class _Job(ctypes.Structure):
    """As in attention.cpp."""

    _fields_ = [  # what ctypes reads
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "output", "mask")),
        *((f"{name}_scale", ctypes.c_void_p) for name in ("query", "key", "value")),
        *((f"{name}_zero", ctypes.c_void_p) for name in ("query", "key", "value")),
        *((name, ctypes.c_void_p) for name in ("next_factor", "next_zero")),
        *((name, ctypes.c_int64) for name in ("samples", "heads", "key_heads", "queries", "keys")),
        *((name, ctypes.c_int64) for name in ("channels", "value_channels", "table_step")),
        *((f"{name}_stride", ctypes.c_int64 * 3) for name in ("query", "key", "value", "output")),
        ("mask_stride", ctypes.c_int64 * 4),
        *((name, ctypes.c_int32) for name in ("low", "high", "causal", "threads")),
        *((f"{name}_coded", ctypes.c_int32) for name in ("query", "key", "value")),
        *((name, ctypes.c_int32) for name in ("one_factor", "next_low", "next_high")),
        ("scale", ctypes.c_float),
    ]


@torch.library.impl("dq_torchao::int8_attention", "CPU")
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    query_scale: Tensor,
    query_zero: Tensor,
    key_scale: Tensor,
    key_zero: Tensor,
    value_scale: Tensor,
    value_zero: Tensor,
    bits: int,
    dtype: torch.dtype,
    next_factor: Tensor | None = None,
    next_zero: Tensor | None = None,
    next_bits: int = 8,
) -> Tensor:
    q, k, v = (_as_read(x) for x in (query, key, value))
    y = output_like(q, v, torch.float32 if next_factor is None else torch.uint8)
    samples, heads, queries, channels = q.shape
    if mask is not None:
        mask = _added(mask).expand(samples, heads, queries, k.shape[2])
    tables = (query_scale, key_scale, value_scale, query_zero, key_zero, value_zero)
    tables = tuple(table.contiguous() for table in tables)  # alive until the kernel has read them
    next_factor = None if next_factor is None else next_factor.contiguous()
    sizes = (samples, heads, k.shape[1], queries, k.shape[2], channels, v.shape[3], int(len(query_scale) > 1))
    strides = [(ctypes.c_int64 * 3)(*x.stride()[:3]) for x in (q, k, v, y)]
    mask_stride = (ctypes.c_int64 * 4)(*(mask.stride() if mask is not None else (0,) * 4))
    pointers = (x.data_ptr() for x in (q, k, v, y))
    masked = None if mask is None else mask.data_ptr()
    codes = (*integer_range(bits), int(is_causal), torch.get_num_threads())
    coded = (int(x.dtype == torch.uint8) for x in (q, k, v))
    written = (bound + code_offset(q.device) for bound in integer_range(next_bits))
    following = (int(next_factor is not None and next_factor.numel() == 1), *written)
    addresses = (*(t.data_ptr() for t in tables), native.address(next_factor), native.address(next_zero))
    job = _Job(*pointers, masked, *addresses, *sizes, *strides, mask_stride, *codes, *coded, *following, scale)
    if not native.library().dq_attention(ctypes.byref(job)):
        raise DQError("the integer attention failed: this build of PyTorch has no int8 products for this processor")
    return y if next_factor is not None else y.to(dtype)


def _as_read(x: Tensor) -> Tensor:
    """Codes, or values in float32; channels contiguous."""
    x = x if x.dtype == torch.uint8 else x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _added(mask: Tensor) -> Tensor:
    """A mask as what is added to the scores, float32."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
