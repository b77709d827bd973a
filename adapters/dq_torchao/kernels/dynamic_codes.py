"""Activation codes by ranges of their own: of each token of a linear layer, of each sample of a convolution.

In eager mode on a CPU a kernel of ours finds the ranges and makes the codes; a compiler fuses the definition.

Shapes: ``x [..., C]``, or ``[N, C, *positions]``; a unit is a token or a sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq_plugins.affine import SMALLEST_SCALE, dynamic_parameters, integer_range
from dq_plugins.plan import DynamicActivationQuant
from dq_torchao.kernels import native
from dq_torchao.kernels.codes import activation_codes, code_offset


def dynamic_codes(
    x: Tensor, factor: Tensor | None, quant: DynamicActivationQuant, spatial: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of `dq_plugins.quantized.input_quantizers.quantize_dynamically`, stored as `activation_codes` stores them.

    Args:
        x: floating-point activations.
        factor: float32, broadcasts against ``x``: the reciprocal of the balance of the channels; None: 1.
        quant: width and form.
        spatial: number of dimensions that the layer slides over.

    Returns:
        codes in the shape of ``x``; scale, float32, and zero point of the signed codes, int32, ``[..., 1]`` or
        ``[N, 1, *1]``.
    """
    shape = _units(x, factor, spatial)
    if shape is not None:
        return _in_one_call(x, factor, quant, spatial, shape)
    values = x.float() if factor is None else x.float() * factor
    scale, zero_point = dynamic_parameters(values, quant.bits, symmetric=quant.symmetric, spatial=spatial)
    return (
        activation_codes(values, scale.reciprocal(), zero_point + code_offset(x.device), quant.bits),
        scale,
        zero_point,
    )


def _units(x: Tensor, factor: Tensor | None, spatial: int) -> tuple[int, int, int] | None:
    """Units, and rows and channels of each, as they lie in memory; None where the kernel does not know them."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel():
        return None
    channels, last = x.shape[-1 - spatial], x.is_contiguous(memory_format=torch.channels_last)
    if not spatial:
        shape = (x.numel() // channels, 1, channels) if x.is_contiguous() else None
    elif x.dim() == 4 and last:
        shape = (len(x), x[0].numel() // channels, channels)
    else:
        plain = x.is_contiguous() and factor is None and x.dim() == spatial + 2
        shape = (len(x), 1, x[0].numel()) if plain else None
    if factor is not None and (factor.dtype != torch.float32 or factor.numel() != channels):
        return None
    return shape if shape and not native.why_not() else None


def _in_one_call(
    x: Tensor, factor: Tensor | None, quant: DynamicActivationQuant, spatial: int, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    lead = x.shape[: x.dim() - 1 - spatial]
    scale = torch.empty(*lead, *[1] * (1 + spatial))
    zero_point = torch.empty_like(scale, dtype=torch.int32)
    codes = torch.empty_like(x, dtype=torch.uint8)
    factor = None if factor is None else factor.contiguous()
    native.library().dq_dynamic_codes(
        x.data_ptr(), codes.data_ptr(), *shape, None if factor is None else factor.data_ptr(), quant.symmetric,
        *integer_range(quant.bits), code_offset(x.device), SMALLEST_SCALE, scale.data_ptr(), zero_point.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return codes, scale, zero_point
