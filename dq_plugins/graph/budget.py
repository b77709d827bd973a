"""Costs of a quantized denoiser per layer and in total: bit operations and bytes of weights.

    bitops(l) = MACs(l) * w_bits(l) * a_bits(l)          van Baalen et al., arXiv 2005.07093, section 3

Both are linear in the choice made for each layer, which is what an exact bit allocation needs.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from dq_plugins.errors import BudgetError
from dq_plugins.graph.partition import LayerInfo

FLOAT_BITS = 32


class Bits(NamedTuple):
    """Bit widths of one layer: of its weight and of its input activations."""

    weight: int
    activation: int


FLOAT = Bits(FLOAT_BITS, FLOAT_BITS)


def bitops(layer: LayerInfo, weight_bits: int, activation_bits: int) -> int:
    """Bit operations of one layer in one call of the denoiser, for the batch it was traced with.

    Args:
        layer: the layer.
        weight_bits: bits of a weight, 1 to 32.
        activation_bits: bits of an input activation, 1 to 32.
    """
    _check(layer.name, weight_bits)
    _check(layer.name, activation_bits)
    return layer.macs * weight_bits * activation_bits


def weight_bytes(layer: LayerInfo, bits: int) -> int:
    """Bytes of one layer's weight, packed; scales and the bias, which stays in floating point, not counted.

    Args:
        layer: the layer.
        bits: bits of a weight, 1 to 32.
    """
    _check(layer.name, bits)
    return -(-prod(layer.weight_shape) * bits // 8)


def total_bitops(layers: Mapping[str, LayerInfo], bits: Mapping[str, Bits], otherwise: Bits = FLOAT) -> int:
    """Bit operations of all layers in one call of the denoiser.

    Args:
        layers: the layers of a partition.
        bits: bit widths by layer name.
        otherwise: bit widths of the layers that ``bits`` does not name.

    Raises:
        BudgetError: ``bits`` names an unknown layer, or a width is not 1 to 32.
    """
    _check_names(layers, bits)
    return sum(bitops(layer, *bits.get(name, otherwise)) for name, layer in layers.items())


def total_weight_bytes(layers: Mapping[str, LayerInfo], bits: Mapping[str, int], otherwise: int = FLOAT_BITS) -> int:
    """Bytes of all layers' weights, packed.

    Args:
        layers: the layers of a partition.
        bits: bits of a weight by layer name.
        otherwise: bits of a weight of the layers that ``bits`` does not name.

    Raises:
        BudgetError: ``bits`` names an unknown layer, or a width is not 1 to 32.
    """
    _check_names(layers, bits)
    return sum(weight_bytes(layer, bits.get(name, otherwise)) for name, layer in layers.items())


def mean_weight_bits(layers: Mapping[str, LayerInfo], bits: Mapping[str, int], otherwise: int = FLOAT_BITS) -> float:
    """Mean bits of a weight over all weights of all layers.

    Args:
        layers: the layers of a partition; at least one.
        bits: bits of a weight by layer name.
        otherwise: bits of a weight of the layers that ``bits`` does not name.

    Raises:
        BudgetError: there is no layer, ``bits`` names an unknown layer, or a width is not 1 to 32.
    """
    _check_names(layers, bits)
    weights = {name: prod(layer.weight_shape) for name, layer in layers.items()}
    if not weights:
        raise BudgetError("there is no layer to average bits over; the partition of the denoiser is empty.")
    for name in bits:
        _check(name, bits[name])
    return sum(n * bits.get(name, otherwise) for name, n in weights.items()) / sum(weights.values())


def _check(name: str, bits: int) -> None:
    if not 1 <= bits <= FLOAT_BITS:
        raise BudgetError(f"layer {name!r} was given {bits} bits; expected is a width from 1 to {FLOAT_BITS}.")


def _check_names(layers: Mapping[str, LayerInfo], bits: Mapping[str, object]) -> None:
    unknown = next((name for name in bits if name not in layers), None)
    if unknown is not None:
        close = difflib.get_close_matches(unknown, layers, n=3) or list(layers)[:3]
        raise BudgetError(
            f"bits were given for {unknown!r}, which is no layer of this denoiser; close to it are: {', '.join(close)}."
        )
