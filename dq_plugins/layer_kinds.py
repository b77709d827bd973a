"""The kinds of layers whose weights can be quantized: one row each, which every other list of layers is made from.

A new kind is a row here. What an adapter has for it (a class with an integer kernel, a layer of its framework) stands
in the adapter, under the name of the row.

Shapes: ``O`` outputs, ``I`` inputs, ``N`` batch; ``...`` the positions: tokens before the channels of a linear layer
(``[N, ..., C]``), pixels behind those of a convolution (``[N, C, ...]``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
Shape = Sequence[int]
Operands = tuple[tuple[int, int], ...]
"""Positions of (input, weight) among the tensor operands of an op; the first pair whose weight is a parameter holds."""

_FIRST, _EITHER, _EITHER_AFTER_BIAS = ((0, 1),), ((0, 1), (1, 0)), ((1, 2), (2, 1))


@dataclass(frozen=True)
class LayerKind:
    """One kind of layer.

    Attributes:
        name: what plans and graphs call it.
        module: PyTorch's class of it.
        operators: the ATen ops that compute it (base names), with their operands.
        spatial: number of dimensions that a kernel slides over.
        output_axis: axis of the weight that belongs to outputs. A transposed convolution has ``[I, O/groups, ...]``:
            one entry of this axis belongs to an output of every group.
        input_axis: axis of the weight that belongs to inputs; of a convolution, those of one group.
        lookup: whether it looks rows up instead of multiplying: its input is indices, so there is no activation to
            quantize and no rounding error to spread over a sum.
    """

    name: str
    module: type[nn.Module]
    operators: Mapping[str, Operands]
    spatial: int = 0
    output_axis: int = 0
    input_axis: int = 1
    lookup: bool = False

    @property
    def channel_axis(self) -> int:
        """Axis of the channels in input and output, from the end, so that it holds without a batch too.

        Example:
            >>> [LAYER_KINDS[name].channel_axis for name in ("linear", "conv1d", "conv2d")]
            [-1, -2, -3]
        """
        return -1 - self.spatial

    @property
    def scale_per_row(self) -> bool:
        """Whether each entry of dimension 0 of the weight may have a scale of its own.

        Integer products can be rescaled once per output, so a scale may differ from output to output and no further.
        """
        return self.lookup or self.output_axis == 0

    def per_output(self, parameter: Tensor) -> Tensor:
        """``[O]``, as a view that broadcasts against the output: ``[O, 1, 1]`` for a 2-d convolution."""
        return parameter.reshape(-1, *[1] * self.spatial)

    def per_input(self, parameter: Tensor, weight: Tensor) -> Tensor:
        """``[I]``, as a view that broadcasts against the weight; with groups, each output sees those of its group."""
        inputs, outputs = weight.shape[1], weight.shape[0]
        if self.output_axis != 0 or len(parameter) % inputs:
            raise ValueError(f"{len(parameter)} input channels do not fit a {self.name} weight {tuple(weight.shape)}")
        groups = len(parameter) // inputs
        rows = parameter.reshape(groups, inputs).repeat_interleave(outputs // groups if groups > 1 else 1, 0)
        return rows.reshape(*rows.shape, *[1] * self.spatial)

    def outputs(self, weight: Shape, groups: int = 1) -> int:
        """Number of output channels, from the shape of the weight and the groups of a convolution."""
        return weight[self.output_axis] * (groups if self.spatial and self.output_axis else 1)

    def products(self, weight: Shape, groups: int = 1) -> int:
        """The most products that one output sums up, from the shape of the weight and the groups of a convolution."""
        return prod(weight) // (weight[self.output_axis] * (groups if self.spatial and self.output_axis else 1))

    def kernel(self, weight: Shape) -> tuple[int, ...]:
        """Extents of the kernel, from the shape of the weight; empty for linear layers."""
        return tuple(weight[len(weight) - self.spatial :])

    def positions(self, features: Shape) -> int:
        """Tokens or pixels of one sample, from the shape of the input or the output."""
        channels = len(features) + self.channel_axis
        return prod(extent for axis, extent in enumerate(features) if axis not in (0, channels))

    def macs(self, x: Shape, weight: Shape, output: Shape) -> int:
        """Multiply-accumulate operations, from the shapes of input, weight and output."""
        if self.lookup:
            return 0
        return prod(output if self.output_axis == 0 else x) * prod(weight[self.channel_axis :])


def _convolution(name: str, module: type[nn.Module], spatial: int) -> LayerKind:
    return LayerKind(name, module, {name: _FIRST}, spatial)


def _transposed(name: str, module: type[nn.Module], spatial: int) -> LayerKind:
    return LayerKind(name, module, {name: _FIRST}, spatial, output_axis=1, input_axis=0)


_PRODUCTS: Mapping[str, Operands] = {
    "linear": _FIRST,
    **dict.fromkeys(("matmul", "mm", "bmm", "einsum", "tensordot"), _EITHER),
    **dict.fromkeys(("addmm", "baddbmm"), _EITHER_AFTER_BIAS),
}

_ROWS = (
    LayerKind("linear", nn.Linear, _PRODUCTS),
    _convolution("conv1d", nn.Conv1d, 1),
    _convolution("conv2d", nn.Conv2d, 2),
    _convolution("conv3d", nn.Conv3d, 3),
    _transposed("conv_transpose1d", nn.ConvTranspose1d, 1),
    _transposed("conv_transpose2d", nn.ConvTranspose2d, 2),
    _transposed("conv_transpose3d", nn.ConvTranspose3d, 3),
    LayerKind(
        "embedding",
        nn.Embedding,
        dict.fromkeys(("embedding", "embedding_bag"), ((1, 0),)),
        output_axis=1,
        input_axis=0,
        lookup=True,
    ),
)

LAYER_KINDS: Mapping[str, LayerKind] = {kind.name: kind for kind in _ROWS}
"""Every kind, by name."""

BY_OPERATOR: Mapping[str, LayerKind] = {operator: kind for kind in _ROWS for operator in kind.operators}
"""The kind of layer that an ATen op computes where its weight comes from parameters, by the op's base name."""

_BY_MODULE = {kind.module: kind for kind in _ROWS}


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a layer, subclasses of PyTorch's classes included; None where it is of no kind.

    Right for what depends on the shapes alone. What replaces a layer's computation asks `exact_kind`.
    """
    return next((_BY_MODULE[each] for each in type(module).__mro__ if each in _BY_MODULE), None)


_ARITHMETIC = ("forward", "_conv_forward", "_output_padding", "__call__", "_call_impl", "__getattr__", "weight", "bias")
"""What a layer's class computes with."""


def exact_kind(module: nn.Module) -> LayerKind | None:
    """The kind of a layer that computes what PyTorch's own class computes; None for subclasses that may not."""
    kind, found = kind_of(module), type(module)
    if kind is None or found is kind.module:
        return kind
    same = all(getattr(found, name, None) is getattr(kind.module, name, None) for name in _ARITHMETIC)
    return kind if same else None


def kind_name(module: nn.Module) -> str:
    """What plans call a layer: its kind, or its class where it is of no kind."""
    kind = kind_of(module)
    return kind.name if kind else type(module).__name__


def mixed_in(mixin: type[M], prefix: str, kinds: Iterable[LayerKind]) -> dict[type[nn.Module], type[M]]:
    """A class for every kind that is both ``mixin`` and PyTorch's class, by PyTorch's class.

    Args:
        mixin: what all of them share. Their names are put beside it, where pickles look for them.
        prefix: of their names; what follows is the name of PyTorch's class.
        kinds: the kinds.
    """
    made = {}
    for kind in kinds:
        name = prefix + kind.module.__name__
        made[kind.module] = type(name, (mixin, kind.module), {"__module__": mixin.__module__, "__doc__": mixin.__doc__})
        setattr(sys.modules[mixin.__module__], name, made[kind.module])
    return made
