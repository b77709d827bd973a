"""Attention on codes behind one operator, ``dq_torchao::int8_attention``, opaque to ``torch.compile``.

Shapes: query ``[B, H, L, D]``, key ``[B, H', S, D]``, value ``[B, H', S, D']`` (H' divides H), mask broadcasting
against ``[B, H, L, S]``; scales float32 and zero points int32, of signed codes, ``[1]`` or ``[B]``.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from dq_plugins.affine import integer_range
from dq_plugins.errors import DQError
from dq_torchao.kernels import native, onednn
from dq_torchao.kernels.operators import Kernel

KERNEL = Kernel("dq_torchao.attention", "uint8 x int8 -> int32")

_TABLES = ", ".join(f"Tensor {operand}_{part}" for operand in ("query", "key", "value") for part in ("scale", "zero"))
torch.library.define(
    "dq_torchao::int8_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float scale, "
    f"{_TABLES}, int bits) -> Tensor",
)
int8_attention = torch.ops.dq_torchao.int8_attention.default


@cache
def cpu_kernel() -> Kernel:
    """The kernel of attention on this processor, built if it is not there yet, or what keeps it from running."""
    if reason := onednn.kernel("linear").unsupported_reason or native.why_not():
        return Kernel("", "", reason)
    try:
        q = torch.ones(1, 1, 1, 4)
        one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
        int8_attention(q, q, q, None, False, 1.0, one, zero, one, zero, one, zero, 8)
    except DQError as error:
        return Kernel("", "", str(error))
    return KERNEL


def attention_kernel(device: torch.device) -> Kernel:
    """The kernel that runs attention on ``device``."""
    if device.type != "cpu":
        return Kernel("", "", f"there is no integer attention for device type {device.type!r}")
    return cpu_kernel()


def output_like(query: Tensor, value: Tensor) -> Tensor:
    """Memory for the result, ``[B, H, L, D']``, heads of a token side by side as PyTorch's attention lays them out."""
    samples, heads, queries, _ = query.shape
    return query.new_empty(samples, queries, heads, value.shape[-1]).transpose(1, 2)


@torch.library.register_fake("dq_torchao::int8_attention")
def _(query: Tensor, key, value: Tensor, *_) -> Tensor:
    return output_like(query, value)


class _Job(ctypes.Structure):
    """As in attention.cpp."""

    _fields_ = [  # what ctypes reads
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "output", "mask")),
        *((f"{name}_scale", ctypes.c_void_p) for name in ("query", "key", "value")),
        *((f"{name}_zero", ctypes.c_void_p) for name in ("query", "key", "value")),
        *((name, ctypes.c_int64) for name in ("samples", "heads", "key_heads", "queries", "keys")),
        *((name, ctypes.c_int64) for name in ("channels", "value_channels", "table_step")),
        *((f"{name}_stride", ctypes.c_int64 * 3) for name in ("query", "key", "value", "output")),
        ("mask_stride", ctypes.c_int64 * 4),
        *((name, ctypes.c_int32) for name in ("low", "high", "causal", "threads")),
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
) -> Tensor:
    q, k, v = (_float32(x) for x in (query, key, value))
    y, (samples, heads, queries, channels) = output_like(q, v), q.shape
    if mask is not None:
        mask = _added(mask).expand(samples, heads, queries, k.shape[2])
    tables = (query_scale, key_scale, value_scale, query_zero, key_zero, value_zero)
    tables = tuple(table.contiguous() for table in tables)  # alive until the kernel has read them
    sizes = (samples, heads, k.shape[1], queries, k.shape[2], channels, v.shape[3], int(len(query_scale) > 1))
    strides = [(ctypes.c_int64 * 3)(*x.stride()[:3]) for x in (q, k, v, y)]
    mask_stride = (ctypes.c_int64 * 4)(*(mask.stride() if mask is not None else (0,) * 4))
    pointers = (x.data_ptr() for x in (q, k, v, y))
    masked = None if mask is None else mask.data_ptr()
    codes = (*integer_range(bits), int(is_causal), torch.get_num_threads())
    job = _Job(*pointers, masked, *(t.data_ptr() for t in tables), *sizes, *strides, mask_stride, *codes, scale)
    if not native.library().dq_attention(ctypes.byref(job)):
        raise DQError("the integer attention failed: this build of PyTorch has no int8 products for this processor")
    return y.to(query.dtype)


def _float32(x: Tensor) -> Tensor:
    """In float32, channels contiguous."""
    x = x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _added(mask: Tensor) -> Tensor:
    """A mask as what is added to the scores, float32."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
