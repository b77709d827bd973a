"""Simulated quantizers of a layer's input: the definition that every backend is held to.

Shapes: ``G`` timestep groups, ``N`` rows of a layer's input.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.affine import code_ranges, dynamic_parameters, fake_quantize, integer_range
from dq_plugins.layer_kinds import LayerKind, kind_of
from dq_plugins.plan import ActivationQuant, DynamicActivationQuant, InputQuant
from dq_plugins.quantized.code_widths import WithWidths, input_widths
from dq_plugins.quantized.layer_transform import InputTransform, LayerTransform
from dq_plugins.quantized.rotate import Rotate
from dq_plugins.quantized.split import Split
from dq_plugins.quantized.straight_through import FakeQuantize, RoundThrough
from dq_plugins.timesteps import RowOrder, TimestepContext, select_for_input


def quantize_input(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor,
    bits: int | Sequence[int | None],
    transform: InputTransform | None = None,
    kind: LayerKind | None = None,
    rows: RowOrder | None = None,
) -> Tensor:
    """Simulated quantization of a layer's input by timestep group; gradients pass straight through.

    Dividing a channel by its balance before the quantizer and multiplying by it afterwards is quantizing it with the
    scale times the balance. A rotation is undone after the quantizer; directions that stay in floating point are not
    part of the result.

    Args:
        x: ``[N, ...]``.
        scale: ``[G]``; may require gradients, and so may the zero point.
        zero_point: ``[G]``, whole numbers.
        index: group of the call, of every sample or of every token: see `dq_plugins.timesteps.select_for_input`.
        bits: width of the code, or the widths of all groups, ``[G]``; None: floating point.
        transform: of the input; ``kind`` of layer is needed with it.
        kind: of the layer.
        rows: where the samples are in ``x``.
    """
    if transform is not None and kind is not None and transform.split is not None:
        given = (scale, zero_point, index, bits, _WithoutSplit(transform), kind, rows)
        return quantize_input(transform.outside(kind, x), *given).to(x.dtype)
    if transform is not None and kind is not None and transform.rotate is not None:
        values = quantize_input(transform.of_rest(kind, x), scale, zero_point, index, bits, kind=kind, rows=rows)
        return transform.input_restored(kind, values).to(x.dtype)
    where = index.to(x.device), x, 0 if kind is None else kind.spatial, rows
    s, z = (select_for_input(table.to(x.device), *where) for table in (scale, zero_point))
    if transform is not None and kind is not None and transform.balance is not None:
        s = s * kind.per_output(transform.balance).to(x.device)
    differentiable = torch.is_grad_enabled() and any(each.requires_grad for each in (x, s, z))
    quantize = FakeQuantize.apply if differentiable else fake_quantize
    if isinstance(bits, int):
        return quantize(x, s, z, *integer_range(bits))
    tables = code_ranges(bits)
    low, high, floating = (select_for_input(t.to(x.device), *where) for t in tables)
    return torch.where(floating, x, quantize(x, s, z, low, high))


class _WithoutSplit(InputTransform):
    def __init__(self, transform: InputTransform) -> None:
        self.balance, self.rotate, self.split = transform.balance, transform.rotate, None


def quantize_dynamically(
    x: Tensor,
    quant: DynamicActivationQuant,
    transform: InputTransform | None = None,
    kind: LayerKind | None = None,
    clip: Tensor | None = None,
) -> Tensor:
    """Simulated quantization of each token, or of each sample of a convolution's input, by its own range; gradients
    pass straight through where nothing is cut off, extremes get none.

    Args:
        x: ``[..., C]``, or ``[N, C, *positions]``.
        quant: width and form.
        transform: see `quantize_input`.
        kind: of the layer; None: a linear one.
        clip: in place of that of ``quant``, ``[]``; may require gradients.
    """
    values = x.float() if transform is None or kind is None else transform.of_input(kind, x)
    known = values.detach()
    spatial = 0 if kind is None else kind.spatial
    share = quant.clip if clip is None else clip
    s, z = dynamic_parameters(known, quant.bits, symmetric=quant.symmetric, spatial=spatial, clip=share)
    quantize: Any = fake_quantize
    if torch.is_grad_enabled() and (values.requires_grad or s.requires_grad):
        quantize = FakeQuantize.apply if clip is not None or quant.clip < 1 else RoundThrough.apply
    values = quantize(values, s, z, *integer_range(quant.bits))
    return (values if transform is None or kind is None else transform.input_restored(kind, values)).to(x.dtype)


class InputQuantizer(InputTransform, WithWidths):
    """What simulated quantizers of a layer's input have in common: the transform of the input before it.

    Args:
        device: where it lives.
        transform: see `quantize_input`.
        kind: of the layer.
    """

    exact_state = ("balance",)

    balance: Tensor | None
    rotate: Rotate | None
    split: Split | None

    def __init__(
        self, device: torch.device, transform: LayerTransform | None = None, kind: LayerKind | None = None
    ) -> None:
        super().__init__()
        balance = None if transform is None else transform.balance
        self.register_buffer("balance", None if balance is None else balance.to(device, copy=True))
        parts = (None, None) if transform is None else (transform.rotate, transform.split)
        self.rotate, self.split = (None if part is None else copy.deepcopy(part).to(device) for part in parts)
        self.kind = kind


class DynamicQuantizer(InputQuantizer):
    """Simulated quantizer of a layer's input with dynamic ranges.

    Args:
        quant: width and form.
        device: where the transform lives.
        transform: see `quantize_dynamically`.
        kind: of the layer.
        context: of the denoiser, where groups have widths of their own: it knows the group of the running call.
        rows: where the samples of a call are in its input.

    Attributes:
        clip: in place of those of ``quant``, ``[G]`` or ``[1]``, while they are learned.
    """

    def __init__(
        self,
        quant: DynamicActivationQuant,
        device: torch.device,
        transform: LayerTransform | None = None,
        kind: LayerKind | None = None,
        context: TimestepContext | None = None,
        rows: RowOrder | None = None,
    ) -> None:
        super().__init__(device, transform, kind)
        self.quant, self.context, self.rows = quant, context, rows
        self.clip: Tensor | None = None
        self.state_widths(input_widths(quant), device)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x``."""
        if self.quant.groups is None or self.context is None:
            return self._in_group(x, 0)
        index = self.context.index(self.quant.groups)
        if index.numel() == 1:
            return self._in_group(x, int(index))
        groups = torch.arange(len(self.quant.widths), device=x.device)
        own = select_for_input(groups, index.to(x.device), x, 0 if self.kind is None else self.kind.spatial, self.rows)
        found = x
        for group in index.unique().tolist():
            found = torch.where(own == group, self._in_group(x, group), found)
        return found

    def _in_group(self, x: Tensor, group: int) -> Tensor:
        clip = None if self.clip is None else self.clip[group]
        return quantize_dynamically(x, self.quant.forms[group], self, self.kind, clip)

    def extra_repr(self) -> str:
        """Width and form."""
        return f"{self.quant}, simulated"


class ActivationQuantizer(InputQuantizer):
    """Simulated quantizer of one layer's input, with one (scale, zero point) per timestep group.

    The two buffers may be replaced at any time; one that requires gradients gets them.

    Args:
        quant: width, groups, and the parameters to start from.
        context: of the denoiser: it knows the group of the running call.
        device: where the parameters live.
        transform: see `quantize_input`.
        kind: of the layer.
        rows: where the samples of a call are in its input.
    """

    exact_state = ("scale", "balance")

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        quant: ActivationQuant,
        context: TimestepContext,
        device: torch.device,
        transform: LayerTransform | None = None,
        kind: LayerKind | None = None,
        rows: RowOrder | None = None,
    ) -> None:
        super().__init__(device, transform, kind)
        self.groups, self.bits, self.context, self.rows = quant.groups, quant.bits, context, rows
        self.group_bits = quant.group_bits
        self.state_widths(input_widths(quant), device)
        self.register_buffer("scale", quant.scale.to(device, copy=True))
        self.register_buffer("zero_point", quant.zero_point.to(device, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x``."""
        index = self.context.index(self.groups)
        bits = self.group_bits or self.bits
        return quantize_input(x, self.scale, self.zero_point, index, bits, self, self.kind, self.rows)

    def extra_repr(self) -> str:
        """Width and groups."""
        return f"bits={self.group_bits or self.bits}, groups={self.groups!r} ({self.scale.numel()}), simulated"


class Unquantized(InputQuantizer):
    """A layer's input in full precision, less the directions that a weight of its own meets."""

    def forward(self, x: Tensor) -> Tensor:
        """x_ of `dq_plugins.quantized.split`."""
        return x if self.kind is None else self.outside(self.kind, x).to(x.dtype)


def input_quantizer(
    quant: InputQuant | None,
    context: TimestepContext,
    layer: nn.Module,
    device: torch.device,
    transform: LayerTransform | None = None,
    rows: RowOrder | None = None,
) -> InputQuantizer | None:
    """The simulated quantizer of a layer's input that a plan asks for; see the classes. None: nothing is done to it."""
    kind = kind_of(layer)
    if quant is None:
        return None if transform is None or transform.split is None else Unquantized(device, transform, kind)
    if isinstance(quant, DynamicActivationQuant):
        return DynamicQuantizer(quant, device, transform, kind, context, rows)
    return ActivationQuantizer(quant, context, device, transform, kind, rows)
