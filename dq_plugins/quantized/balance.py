"""Input channels of a layer that are divided by factors, and weights that are multiplied by them: exact together.

Shapes: ``C`` input channels; a balance is float32 ``[C]``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dq_plugins.layer_kinds import kind_of
from dq_plugins.plan import WeightQuant


def per_input(layer: nn.Module, balance: Tensor) -> Tensor:
    """A balance as it broadcasts against the layer's weight."""
    kind, weight = kind_of(layer), _weight(layer)
    assert kind is not None
    return kind.per_input(balance.to(weight.device), weight)


def for_input(layer: nn.Module, balance: Tensor | None) -> Tensor | None:
    """A balance as it broadcasts against the layer's input."""
    kind = kind_of(layer)
    return None if balance is None or kind is None else kind.per_output(balance)


def balanced_weight(layer: nn.Module, balance: Tensor | None, weight: Tensor | None = None) -> Tensor:
    """The weight that multiplies the divided input, at least float32; the same weight without a balance.

    Args:
        layer: the layer.
        balance: ``[C]``.
        weight: its full-precision weight, while it computes with another one; by default the one that it has.
    """
    weight = _weight(layer) if weight is None else weight
    return weight if balance is None else weight * per_input(layer, balance)


def fake_weight(layer: nn.Module, quant: WeightQuant, balance: Tensor | None, weight: Tensor | None = None) -> Tensor:
    """The weight that a quantized layer computes with, for the input as it comes: the balance is undone."""
    return unbalanced(layer, quant.fake_quantize(balanced_weight(layer, balance, weight)), balance)


def unbalanced(layer: nn.Module, weight: Tensor, balance: Tensor | None) -> Tensor:
    """A weight for divided inputs as one for the input as it comes."""
    return weight if balance is None else (weight / per_input(layer, balance)).to(_weight(layer).dtype)


def _weight(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    return weight
