"""What one bit a weight saves: bytes and operations.

Sources: BinaryDM, section 4.3: ``OPs = BOPs / 64 + FLOPs`` with ``BOPs = MACs b_a b_w`` of the quantized layers (one
64-bit instruction does 64 one-bit products) and ``FLOPs`` the multiply-accumulates that stay in floating point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from dq_plugins.graph import Partition
from dq_plugins.quantized.packing import packed_bytes
from dq_plugins.quantized.trained_layers import LayerChoice, trained_layers

FLOAT_BYTES = 4
WORD_BITS = 64


@dataclass(frozen=True)
class Saving:
    """What there was in floating point, and what is left: bytes or operations."""

    original: int
    quantized: float

    @property
    def ratio(self) -> float:
        """How many times less."""
        return self.original / self.quantized if self.quantized else 1.0


def weight_size(model: nn.Module, *, binary_only: bool = False) -> Saving:
    """Bytes of the weights of all layers that train quantized, in float32 and packed with their float32 scales.

    Args:
        model: after `train_quantized`.
        binary_only: leave out the 8-bit layers.
    """
    original, packed = 0, 0
    for layer in trained_layers(model).values():
        bits = layer.weight_quantizer.bits
        if bits > 1 and binary_only:
            continue
        original += FLOAT_BYTES * layer.weight.numel()
        packed += packed_bytes(layer.weight.shape, bits) + FLOAT_BYTES * layer.weight.shape[0]
    return Saving(original, packed)


def operations(part: Partition, choices: Mapping[str, LayerChoice]) -> Saving:
    """Multiply-accumulates of one call for the batch of the example inputs, and the paper's ``OPs`` of a choice.

    A layer whose input stays in floating point counts as floating point, like one without a choice.
    """
    binary, floating = 0, 0
    for name, layer in part.layers.items():
        choice = choices.get(name)
        if choice is None or choice.act_bits is None:
            floating += layer.macs
        else:
            binary += layer.macs * choice.act_bits * (1 if choice.binary else 8)
    return Saving(sum(layer.macs for layer in part.layers.values()), binary / WORD_BITS + floating)
