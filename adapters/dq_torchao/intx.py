"""A packed weight as torchao's own tensor: `IntxUnpackedToInt8Tensor`, one int8 a value, 1 to 8 bits of it used.

torchao's class is what its export paths and its safetensors support know. It holds the same codes and scales, so it
computes the same values; it takes a byte a value whatever the width, which is why layers do not hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization import IntxUnpackedToInt8Tensor

from dq_plugins.errors import DQError
from dq_torchao.packed_weight import PackedWeight


def intx_tensor(layer: PackedWeight) -> IntxUnpackedToInt8Tensor:
    """The weight of a layer as torchao's tensor, such as for a plain ``nn.Linear`` or ``nn.Conv2d``.

    Args:
        layer: any layer with a packed weight.

    Returns:
        A tensor of the weight's shape and dtype, with one block of quantization parameters for each output, or for each
        group of its inputs.

    Raises:
        DQError: a zero point does not fit int8, which is what the class holds, or the input channels are balanced.
    """
    if layer.inverse_balance is not None:
        raise DQError(
            f"the input channels of this {type(layer).__name__} are balanced, and torchao's tensor has no factor for "
            "each of them; leave the pass 'channel-balance' out of the recipe"
        )
    if layer.input_rotation is not None:
        raise DQError(
            f"the input channels of this {type(layer).__name__} are rotated, and torchao's tensor has no place for it; "
            "leave the pass 'rotation' out of the recipe"
        )
    if layer.low_rank is not None:
        raise DQError(
            f"this {type(layer).__name__} has a low-rank branch, and torchao's tensor has no place for it; leave the "
            "pass 'low-rank' out of the recipe"
        )
    if layer.input_split is not None:
        raise DQError(
            f"a part of the input of this {type(layer).__name__} stays in floating point, and torchao's tensor has no "
            "place for it; leave the pass 'low-rank' out of the recipe"
        )
    codes = layer.weight_codes
    zero_point = layer.weight_zero_point
    if zero_point is None:
        zero_point = torch.zeros_like(layer.weight_scale, dtype=torch.int32)
    if bool((zero_point.abs() > 127).any()):
        raise DQError(f"torchao holds zero points in int8, and this {type(layer).__name__} has one beyond 127")
    scale, groups = layer.weight_scale, layer.weight_group_scale
    if groups is not None:
        scale = scale[:, None] * groups
    block = (
        layer.weight_shape[1:]
        if groups is None
        else (layer.weight_shape[1] // groups.shape[1], *layer.weight_shape[2:])
    )
    bits = 2 if layer.weight_signs else layer.weight_bits  # -1 and +1 are codes of two bits
    return IntxUnpackedToInt8Tensor(
        codes,
        _blocks(scale, codes),
        _blocks(zero_point.to(torch.int8).reshape(len(zero_point), -1).expand_as(scale.reshape(len(scale), -1)), codes),
        getattr(torch, f"int{bits}"),
        (1, *block),
        layer.weight_dtype,
        None,
    )


def _blocks(parameters: Tensor, codes: Tensor) -> Tensor:
    """``[O]`` or ``[O, P]`` with as many dimensions as the codes."""
    blocks = parameters.reshape(len(parameters), -1)
    return blocks.reshape(*blocks.shape, *[1] * (codes.dim() - 2))
