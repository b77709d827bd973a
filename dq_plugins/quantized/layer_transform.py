"""What happens to the input channels of a layer before they are quantized, and the inverse to the weights they meet.

    x' = (x_ / balance) R          w' = ((w - l)_ balance) R          f(x', w') + f(x, l) = f(x, w) in full precision

``l`` is the low-rank branch, which is neither quantized nor sees a quantized input. Where directions of the input stay
in floating point, ``x_`` and ``w_`` are what is left without them, and ``l`` includes what meets them
(`dq_plugins.quantized.split`).

Everything that looks at inputs or weights of planned layers looks at x' and w': ranges, rounding, sensitivity.

Shapes: ``C`` input channels; a balance is float32 ``[C]``; ``R`` rotates blocks of channels, see
`dq_plugins.quantized.rotate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.hashing import hash_json, hash_tensors
from dq_plugins.layer_kinds import LayerKind, kind_of
from dq_plugins.plan import LayerPlan, LowRank, WeightQuant
from dq_plugins.quantized.rotate import Rotate
from dq_plugins.quantized.split import Split

KEPT = torch.float16
"""Dtype of the part of a weight that stays in floating point."""


class InputTransform:
    """What happens to a layer's input; for classes that have a balance ``[C]``, a rotation and a split, or None."""

    balance: Tensor | None
    rotate: Rotate | None
    split: Split | None

    def of_input(self, kind: LayerKind, x: Tensor) -> Tensor:
        """x' of a layer of this kind, at least float32."""
        return self.of_rest(kind, self.outside(kind, x))

    def outside(self, kind: LayerKind, x: Tensor) -> Tensor:
        """x_, what is left without the directions that stay in floating point."""
        return x if self.split is None else self.split.outside(x, kind.channel_axis)

    def of_rest(self, kind: LayerKind, x: Tensor) -> Tensor:
        """x' of x_, at least float32."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.balance is not None:
            x = x * kind.per_output(self.balance.to(x).reciprocal())
        return x if self.rotate is None else self.rotate(x, kind.channel_axis)

    def input_restored(self, kind: LayerKind, x: Tensor) -> Tensor:
        """x_ of x'."""
        if self.rotate is not None:
            x = self.rotate(x, kind.channel_axis, inverse=True)
        return x if self.balance is None else x * kind.per_output(self.balance.to(x.device))


@dataclass(frozen=True, eq=False)
class LayerTransform(InputTransform):
    """Balance, rotation, low-rank branch and split of one layer; without any, `transform_of` gives None instead.

    Attributes:
        balance: positive float32 ``[C]``.
        rotate: of the divided channels.
        low_rank: a part of l.
        split: of the input.
    """

    balance: Tensor | None = None
    rotate: Rotate | None = None
    low_rank: LowRank | None = None
    split: Split | None = None

    @property
    def hash(self) -> str:
        """sha256 over it."""
        parts = {"balance": self.balance, "matrix": None if self.rotate is None else self.rotate.matrix}
        if self.low_rank is not None:
            branch = {"down": self.low_rank.down, "up": self.low_rank.up, "scale": self.low_rank.scale}
            parts |= {name: part for name, part in branch.items() if part is not None}
        if self.split is not None:
            parts["basis"] = self.split.basis
        kind = None if self.rotate is None else self.rotate.kind
        return hash_json([kind, hash_tensors({name: part for name, part in parts.items() if part is not None})])

    def branch(self, weight: Tensor) -> Tensor | None:
        """l of a layer with this full-precision weight, in its shape and dtype."""
        if self.low_rank is None and self.split is None:
            return None
        branch = torch.zeros_like(weight) if self.low_rank is None else self.low_rank.weight(weight)
        kept = self.kept(weight)
        if self.split is not None and kept is not None:
            branch = branch + self.split.spread(kept.to(torch.promote_types(weight.dtype, torch.float32)))
        return branch.to(weight.dtype)

    def kept(self, weight: Tensor) -> Tensor | None:
        """What meets the directions that stay in floating point, float16 ``[O, r, ...]``; None without a split."""
        return None if self.split is None else self.split.kept(self._beside_low_rank(weight)).to(KEPT)

    def _beside_low_rank(self, weight: Tensor) -> Tensor:
        return weight if self.low_rank is None else weight - self.low_rank.weight(weight)

    def of_weight(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """w', at least float32."""
        weight = self._beside_low_rank(weight)
        if self.split is not None:
            weight = self.split.outside(weight, 1)
        if self.balance is not None:
            weight = weight * per_input(layer, self.balance, weight)
        return weight if self.rotate is None else self.rotate(weight, 1)

    def weight_restored(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """The weight for x_ of w', in the dtype of the layer's own weight."""
        if self.rotate is not None:
            weight = self.rotate(weight, 1, inverse=True)
        if self.balance is not None:
            weight = weight / per_input(layer, self.balance, weight)
        return weight.to(_weight(layer).dtype)


def transform_of(plan: LayerPlan) -> LayerTransform | None:
    """The transform of a planned layer's input; None where it comes as it is."""
    if plan.balance is None and plan.rotation is None and plan.low_rank is None and plan.subspace is None:
        return None
    rotate = None if plan.rotation is None else Rotate(plan.rotation)
    return LayerTransform(plan.balance, rotate, plan.low_rank, None if plan.subspace is None else Split(plan.subspace))


def transforms_of(layers: Mapping[str, LayerPlan]) -> dict[str, LayerTransform]:
    """The transforms of those layers of a plan whose input has one, by name."""
    return {name: found for name, layer in layers.items() if (found := transform_of(layer)) is not None}


def per_input(layer: nn.Module, balance: Tensor, weight: Tensor | None = None) -> Tensor:
    """A balance as it broadcasts against a weight of the layer, by default its own."""
    kind, weight = kind_of(layer), _weight(layer) if weight is None else weight
    assert kind is not None
    return kind.per_input(balance.to(weight.device), weight)


def transformed_input(layer: nn.Module, transform: LayerTransform | None, x: Tensor) -> Tensor:
    """What the quantizer of a layer's input sees; the input itself without a transform."""
    kind = kind_of(layer)
    return x if transform is None or kind is None else transform.of_input(kind, x)


def transformed_weight(layer: nn.Module, transform: LayerTransform | None, weight: Tensor | None = None) -> Tensor:
    """The weight that multiplies the transformed input, at least float32; the same weight without a transform.

    Args:
        layer: the layer.
        transform: of its input.
        weight: its full-precision weight, while it computes with another one; by default the one that it has.
    """
    weight = _weight(layer) if weight is None else weight
    return weight if transform is None else transform.of_weight(layer, weight)


def fake_weight(
    layer: nn.Module, quant: WeightQuant, transform: LayerTransform | None, weight: Tensor | None = None
) -> Tensor:
    """What a quantized weight comes to for the input as it comes: transform undone, low-rank branch included."""
    quantized = quant.fake_quantize(transformed_weight(layer, transform, weight))
    full = _weight(layer) if weight is None else weight
    restored, branch = restored_weight(layer, quantized, transform), transform and transform.branch(full)
    if transform is not None and transform.split is not None:
        restored = transform.split.outside(restored, 1).to(restored.dtype)
    return restored if branch is None else restored + branch


def restored_weight(layer: nn.Module, weight: Tensor, transform: LayerTransform | None) -> Tensor:
    """A weight for transformed inputs as one for x_, beside l."""
    return weight if transform is None else transform.weight_restored(layer, weight)


def _weight(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    # stored in 8 bits by layer-wise casting: floating point that few operations take
    return weight.float() if weight.is_floating_point() and weight.element_size() == 1 else weight
