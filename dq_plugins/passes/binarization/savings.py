"""What one bit a weight saves: bytes and operations.

Sources: BinaryDM, section 4.3: ``OPs = BOPs / 64 + FLOPs`` with ``BOPs = MACs b_a b_w`` of the quantized layers (one
64-bit instruction does 64 one-bit products) and ``FLOPs`` the multiply-accumulates that stay in floating point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from dq_plugins.graph import Partition
from dq_plugins.quantized.binarizers import BinaryBasis, EvolvableBasis
from dq_plugins.quantized.packing import packed_bytes
from dq_plugins.quantized.trained_layers import LayerChoice, trained_layers

FLOAT_BYTES = 4
WORD_BITS = 64


@dataclass(frozen=True)
class Size:
    """Bytes of weights and their scales.

    Attributes:
        original: the same weights in float32.
        stored: codes packed without gaps, and one float32 scale per output channel, in memory and on disk.
    """

    original: int
    stored: int

    @property
    def ratio(self) -> float:
        """How many times smaller than float32."""
        return self.original / self.stored if self.stored else 1.0


def weight_size(model: nn.Module, *, binary_only: bool = False) -> Size:
    """Size of the weights of all layers that train quantized, once they are packed.

    Args:
        model: after `train_quantized`.
        binary_only: leave out the 8-bit layers.
    """
    original, stored = 0, 0
    for layer in trained_layers(model).values():
        bits = 1 if isinstance(layer.weight_quantizer, BinaryBasis | EvolvableBasis) else layer.weight_quantizer.bits
        if bits > 1 and binary_only:
            continue
        original += FLOAT_BYTES * layer.weight.numel()
        stored += packed_bytes(layer.weight.shape, bits) + FLOAT_BYTES * layer.weight.shape[0]
    return Size(original, stored)


@dataclass(frozen=True)
class Operations:
    """Operations of one call of the denoiser, for the batch of the example inputs.

    Attributes:
        original: multiply-accumulates of all layers in floating point.
        quantized: ``OPs`` of the paper.
    """

    original: int
    quantized: float

    @property
    def ratio(self) -> float:
        """How many times fewer."""
        return self.original / self.quantized


def operations(part: Partition, choices: Mapping[str, LayerChoice]) -> Operations:
    """The paper's operation count of a choice of widths.

    A layer whose input stays in floating point counts as floating point, like one without a choice.
    """
    binary, floating = 0, 0
    for name, layer in part.layers.items():
        choice = choices.get(name)
        if choice is None or choice.act_bits is None:
            floating += layer.macs
        else:
            binary += layer.macs * choice.act_bits * (1 if choice.binary else 8)
    return Operations(sum(layer.macs for layer in part.layers.values()), binary / WORD_BITS + floating)
