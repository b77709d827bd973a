"""What one bit a weight saves: bytes and operations, in theory and as stored.

Sources: BinaryDM, section 4.3: ``OPs = BOPs / 64 + FLOPs`` with ``BOPs = MACs b_a b_w`` of the quantized layers (one
64-bit instruction does 64 one-bit products) and ``FLOPs`` the multiply-accumulates that stay in floating point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import nn

from dq_plugins.graph import Partition
from dq_plugins.passes.binarization.finish import stored_weight
from dq_plugins.passes.binarization.integer_layers import IntegerLayer
from dq_plugins.quantized.trained_layers import LayerChoice, QuantizedTraining

SCALE_BYTES = 4
WORD_BITS = 64


@dataclass(frozen=True)
class Size:
    """Bytes of weights and their scales.

    Attributes:
        original: the same weights in float32.
        theoretical: bits of the codes / 8, and one float32 scale per output channel.
        stored: bytes the tensors take, in memory and on disk.
    """

    original: int
    theoretical: float
    stored: int

    @property
    def ratio(self) -> float:
        """How many times smaller than float32."""
        return self.original / self.stored if self.stored else 1.0


def weight_sizes(model: nn.Module, *, binary_only: bool = False) -> dict[str, Size]:
    """Size of the weight of every trained (after the transition) or integer layer, by name.

    Args:
        model: after `train_quantized` or `to_integer`.
        binary_only: leave out the 8-bit layers.
    """
    sizes = {}
    for name, module in model.named_modules():
        if not isinstance(module, IntegerLayer | QuantizedTraining):
            continue
        weight = module.weight if isinstance(module, IntegerLayer) else stored_weight(module)
        if binary_only and not weight.binary:
            continue
        elements, outputs = prod(weight.shape), weight.shape[0]
        bits = 1 if weight.binary else 8
        stored = sum(t.numel() * t.element_size() for t in (weight.data, weight.scale))
        sizes[name] = Size(4 * elements, elements * bits / 8 + SCALE_BYTES * outputs, stored)
    return sizes


def total_size(sizes: Mapping[str, Size]) -> Size:
    """Sum over layers."""
    return Size(
        sum(s.original for s in sizes.values()),
        sum(s.theoretical for s in sizes.values()),
        sum(s.stored for s in sizes.values()),
    )


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
