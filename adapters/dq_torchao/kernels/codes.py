"""Activation codes in the integer dtype a device's kernels take.

oneDNN multiplies unsigned activations fastest (AVX512-VNNI has one instruction for uint8 x int8), so on a CPU the
signed codes of `dq_plugins.affine` are stored shifted by 128; the zero point moves along, the values do not.

In eager mode on a CPU a kernel of ours makes them in one pass over memory; a compiler fuses the definition into what
made the values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq_plugins.affine import integer_range
from dq_torchao.kernels import native
from dq_torchao.kernels.tracing import is_merged


def code_offset(device: torch.device) -> int:
    """What is added to a signed code on ``device``: 128 where codes are unsigned, 0 elsewhere."""
    return 128 if device.type == "cpu" else 0


def kernel_dtype(values: Tensor) -> torch.dtype:
    """Dtype in which the kernels take (biases) and return (results) what is in the dtype of ``values`` elsewhere.

    oneDNN knows float32 and bfloat16 on every processor, float16 on some and for some operators only, float64 never:
    the latter two go through float32.
    """
    return values.dtype if values.device.type != "cpu" or values.dtype == torch.bfloat16 else torch.float32


def width_and_clip(form: Tensor) -> tuple[int, float]:
    """Width of the codes and share of the extremes, from the largest code and that share, ``[2]``."""
    return 1 + int(form[0]).bit_length(), float(form[1])


def activation_codes(x: Tensor, factor: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes of ``x``: `dq_plugins.affine.quantize`, shifted by `code_offset`, in one integer byte.

    Args:
        x: floating-point activations.
        factor: float32, broadcasts against ``x``; the reciprocal of the scale, over the balance of the channels if they
            have one.
        zero_point: int32, broadcasts as well; of the stored codes, that is, with the offset.
        bits: width of the code, at most 8.

    Returns:
        uint8 (CPU) or int8 codes, the shape and memory format of ``x``.
    """
    if is_merged(x.device):
        return traced_codes(x, factor, zero_point, bits)
    if one_pass(x, factor, zero_point):
        return torch.ops.dq_torchao.activation_codes(x, factor, zero_point, bits)
    return _in_operations(x, factor, zero_point, bits)


def _in_operations(x: Tensor, factor: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    offset = code_offset(x.device)
    low, high = (bound + offset for bound in integer_range(bits))
    # In place: eager mode then touches one buffer of the size of x. Inductor makes one loop of it either way.
    codes = (x.float() * factor).round_().add_(zero_point).clamp_(low, high)
    return codes.to(torch.uint8 if offset else torch.int8)


# One operator until a compiler wants to know what it is made of: tracing its operations took a sixth of the time that
# tracing a denoiser takes.
torch.library.define("dq_torchao::traced_codes", "(Tensor x, Tensor factor, Tensor zero_point, int bits) -> Tensor")
torch.library.impl("dq_torchao::traced_codes", "CompositeImplicitAutograd")(_in_operations)
traced_codes = torch.ops.dq_torchao.traced_codes.default

torch.library.define("dq_torchao::activation_codes", "(Tensor x, Tensor factor, Tensor zero_point, int bits) -> Tensor")


@torch.library.register_fake("dq_torchao::activation_codes")
def _(x: Tensor, factor: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


def one_pass(x: Tensor, factor: Tensor, zero_point: Tensor) -> bool:
    """Whether the kernel of ours makes these codes: eager, dense float32, one factor or one for each channel."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or zero_point.numel() > 1:
        return False
    if (x.dtype, factor.dtype, zero_point.dtype) != (torch.float32, torch.float32, torch.int32):
        return False
    return _rows(x, factor) is not None and not native.why_not()


def _rows(x: Tensor, factor: Tensor) -> tuple[int, int] | None:
    """Rows and channels of ``x`` as they lie in memory; None where the kernel does not know them."""
    plain = x.is_contiguous()
    if not x.numel() or not (plain or x.is_contiguous(memory_format=torch.channels_last)):
        return None
    if factor.numel() == 1:
        return 1, x.numel()
    axis = -1 if plain else 1  # the channels that lie side by side
    behind = x.dim() - 1 - axis % x.dim()
    matches = factor.dim() > behind and factor.shape[-1 - behind] == factor.numel() == x.shape[axis]
    return (x.numel() // x.shape[axis], x.shape[axis]) if matches else None


@torch.library.impl("dq_torchao::activation_codes", "CPU")
def _codes(x: Tensor, factor: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    rows = _rows(x, factor)
    assert rows is not None
    y, factor = torch.empty_like(x, dtype=torch.uint8), factor.contiguous()
    low, high = (bound + code_offset(x.device) for bound in integer_range(bits))
    native.library().dq_codes(
        x.data_ptr(), y.data_ptr(), *rows, factor.data_ptr(), factor.numel() == 1, zero_point.data_ptr(), low, high,
        torch.get_num_threads(),
    )  # fmt: skip
    return y
