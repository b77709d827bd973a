"""Activation codes in the integer dtype a device's kernels take.

oneDNN multiplies unsigned activations fastest (AVX512-VNNI has one instruction for uint8 x int8), so on a CPU the
signed codes of `dq_plugins.affine` are stored shifted by 128; the zero point moves along, the values do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq_plugins.affine import integer_range


def code_offset(device: torch.device) -> int:
    """What is added to a signed code on ``device``: 128 where codes are unsigned, 0 elsewhere."""
    return 128 if device.type == "cpu" else 0


def kernel_dtype(values: Tensor) -> torch.dtype:
    """Dtype in which the kernels take (biases) and return (results) what is in the dtype of ``values`` elsewhere.

    oneDNN knows float32 and bfloat16 on every processor, float16 on some and for some operators only, float64 never:
    the latter two go through float32.
    """
    return values.dtype if values.device.type != "cpu" or values.dtype == torch.bfloat16 else torch.float32


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
    offset = code_offset(x.device)
    low, high = (bound + offset for bound in integer_range(bits))
    # In place: eager mode then touches one buffer of the size of x. Inductor makes one loop of it either way.
    codes = (x.float() * factor).round_().add_(zero_point).clamp_(low, high)
    return codes.to(torch.uint8 if offset else torch.int8)
