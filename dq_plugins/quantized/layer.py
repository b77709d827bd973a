"""One layer that computes with a quantized weight and a quantized input: the wrapper that everything uses.

The module keeps its class, its name and its forward. Its weight is replaced by the values that the quantized layer
computes with, and its input passes through its ``input_quantizer`` first. Both are replaced by assignment: nothing is
computed when a run switches between widths, codes or ranges.

Shapes: ``G`` timestep groups, ``B`` samples of a call, ``N`` rows of a layer's input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dq_plugins.affine import code_ranges, dynamic_parameters, fake_quantize, integer_range
from dq_plugins.errors import PlanError
from dq_plugins.layer_kinds import LayerKind, kind_of
from dq_plugins.plan import ActivationQuant, DynamicActivationQuant, InputQuant, LayerPlan, WeightQuant
from dq_plugins.quantized.code_widths import WithWidths, input_widths
from dq_plugins.quantized.layer_transform import (
    InputTransform,
    LayerTransform,
    restored_weight,
    transform_of,
    transformed_weight,
)
from dq_plugins.quantized.memory import give_back
from dq_plugins.quantized.output_correction import OutputCorrection
from dq_plugins.quantized.rotate import Rotate
from dq_plugins.quantized.straight_through import FakeQuantize
from dq_plugins.timesteps import RowOrder, TimestepContext, select_for_input

MUCH = 1 << 24
"""Bytes of a weight made for one call, after which free memory goes back to the system."""


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
    scale times the balance. A rotation is undone after the quantizer.

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
    if transform is not None and kind is not None and transform.rotate is not None:
        values = quantize_input(transform.of_input(kind, x), scale, zero_point, index, bits, kind=kind, rows=rows)
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


def quantize_dynamically(
    x: Tensor, quant: DynamicActivationQuant, transform: InputTransform | None = None, kind: LayerKind | None = None
) -> Tensor:
    """Simulated quantization of each token, or of each sample of a convolution's input, by its own range; gradients
    pass straight through, ranges get none.

    Args:
        x: ``[..., C]``, or ``[N, C, *positions]``.
        quant: width and form.
        transform: see `quantize_input`.
        kind: of the layer; None: a linear one.
    """
    values = x.float() if transform is None or kind is None else transform.of_input(kind, x)
    known = values.detach()
    spatial = 0 if kind is None else kind.spatial
    s, z = dynamic_parameters(known, quant.bits, symmetric=quant.symmetric, spatial=spatial)
    values = fake_quantize(known, s, z, *integer_range(quant.bits)) + (values - known)
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

    def __init__(
        self, device: torch.device, transform: LayerTransform | None = None, kind: LayerKind | None = None
    ) -> None:
        super().__init__()
        balance = None if transform is None else transform.balance
        self.register_buffer("balance", None if balance is None else balance.to(device, copy=True))
        rotation = None if transform is None else transform.rotate
        self.rotate = None if rotation is None else copy.deepcopy(rotation).to(device)
        self.kind = kind


class DynamicQuantizer(InputQuantizer):
    """Simulated quantizer of a layer's input with dynamic ranges.

    Args:
        quant: width and form.
        device: where the transform lives.
        transform: see `quantize_dynamically`.
        kind: of the layer.
    """

    def __init__(
        self,
        quant: DynamicActivationQuant,
        device: torch.device,
        transform: LayerTransform | None = None,
        kind: LayerKind | None = None,
    ) -> None:
        super().__init__(device, transform, kind)
        self.quant = quant
        self.state_widths(input_widths(quant), device)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x``."""
        return quantize_dynamically(x, self.quant, self, self.kind)

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


def input_quantizer(
    quant: InputQuant,
    context: TimestepContext,
    layer: nn.Module,
    device: torch.device,
    transform: LayerTransform | None = None,
    rows: RowOrder | None = None,
) -> InputQuantizer:
    """The simulated quantizer of a layer's input that a plan asks for; see the two classes."""
    kind = kind_of(layer)
    if isinstance(quant, DynamicActivationQuant):
        return DynamicQuantizer(quant, device, transform, kind)
    return ActivationQuantizer(quant, context, device, transform, kind, rows)


class LayerState(NamedTuple):
    """What a layer computes with; the default is full precision.

    Attributes:
        weight: the values in place of its weight, on whatever they depend: codes, soft rounding, anything that may
            require gradients; or what makes them, called whenever the layer runs, which keeps none of them. None: its
            own.
        quantizer: what its input passes through: see `input_quantizer`, or any module from tensor to tensor.
        correction: what its output passes through: an `OutputCorrection`, or any module from tensor to tensor.
        branch: a part of its full-precision weight, of the weight's shape, that meets the input as it comes; ``weight``
            is the rest.
    """

    weight: Tensor | Callable[[], Tensor] | None = None
    quantizer: nn.Module | None = None
    correction: nn.Module | None = None
    branch: Tensor | None = None


class QuantizedLayer:
    """Puts a module into one state after another.

    A branch beside a quantized input is more input channels: the module multiplies ``[Q(x), x]`` by ``[w, branch]``.

    Args:
        module: any module with a ``weight``.

    Raises:
        PlanError: it has none.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(getattr(module, "weight", None), Tensor):
            raise PlanError(f"a {type(module).__name__} has no weight tensor, so it cannot be quantized")
        self.module = module
        self.full = module._parameters.get("weight")
        self._made: list[Any] = []
        module.register_module("input_quantizer", None)
        module.register_module("output_correction", None)
        module.input_beside = False  # type: ignore[assignment]
        self._hooks = (
            module.register_forward_pre_hook(_quantize_input, with_kwargs=True),
            module.register_forward_hook(_correct_output),
        )

    def use(self, state: LayerState) -> None:
        """Compute with ``state`` from now on."""
        for hook in self._made:
            hook.remove()
        self._made = []
        weight: Any = state.weight
        if callable(weight) and not isinstance(weight, Tensor):
            self._make(weight)
            weight = None
        if self.full is not None:
            self.module._parameters["weight"] = self._weight(self.full, weight, state)
        self.module.input_beside = state.branch is not None and state.quantizer is not None  # type: ignore[assignment]
        self.module._modules["input_quantizer"] = state.quantizer
        self.module._modules["output_correction"] = state.correction

    def _weight(self, full: nn.Parameter, weight: Any, state: LayerState) -> nn.Parameter:
        if state.branch is None:
            return full if weight is None else weight
        weight = full - state.branch if weight is None else weight
        whole = weight + state.branch if state.quantizer is None else torch.cat([weight, state.branch], 1)
        return whole if whole.requires_grad else nn.Parameter(whole, requires_grad=False)

    def _make(self, weight: Callable[[], Tensor]) -> None:
        """Have the weight while the layer runs, and its own again afterwards, however it ends."""

        def before(module: nn.Module, _: Any) -> None:
            module._parameters["weight"] = weight()  # type: ignore[assignment]

        def after(module: nn.Module, *_: Any) -> None:
            made, module._parameters["weight"] = module._parameters["weight"], self.full
            if made is not None and made.nbytes > MUCH:
                del made
                give_back()

        self._made = [
            self.module.register_forward_pre_hook(before),
            self.module.register_forward_hook(after, always_call=True),
        ]

    def remove(self) -> None:
        """Leave the module exactly as it was found."""
        self.use(LayerState())
        for hook in self._hooks:
            hook.remove()
        for name in ("input_quantizer", "output_correction"):
            del self.module._modules[name]
        del self.module.input_beside


def _quantize_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    # Looked up on the module that runs, so that copies of it, and replicas on other devices, use their own.
    quantizer: Any = module.input_quantizer
    if quantizer is None:
        return None

    def quantized(x: Tensor) -> Tensor:
        kind = kind_of(module)
        if not module.input_beside or kind is None:
            return quantizer(x)
        return torch.cat([quantizer(x), x], kind.channel_axis)

    if args:
        return (quantized(args[0]), *args[1:]), kwargs
    return args, {name: quantized(x) if place == 0 else x for place, (name, x) in enumerate(kwargs.items())}


def _correct_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    correction: Any = module.output_correction
    return output if correction is None else correction(output)


@torch.no_grad()
def planned_state(
    module: nn.Module,
    plan: LayerPlan,
    context: TimestepContext,
    *,
    quantize_inputs: bool = True,
    streamed: bool = False,
) -> LayerState:
    """The state that a plan describes.

    Args:
        module: the full-precision layer.
        plan: what the plan says about it.
        context: the context attached to the denoiser.
        quantize_inputs: whether its input is quantized, where the plan says how.
        streamed: its weight is made whenever it runs, instead of once.
    """
    weight: Any = module.weight
    values = quantizer = correction = None
    transform = transform_of(plan)
    if plan.weight is not None:
        make = partial(_values, module, plan.weight, transform, weight)
        values = make if streamed and (transform is None or transform.branch(weight) is None) else make()
    kind = kind_of(module)
    if plan.activation is not None and quantize_inputs:
        quantizer = input_quantizer(plan.activation, context, module, weight.device, transform, plan.rows)
    if plan.bias_correction is not None and kind is not None:
        correction = OutputCorrection(plan.bias_correction, context, kind, weight.device, plan.rows)
    return LayerState(values, quantizer, correction, transform and transform.branch(weight))


@torch.no_grad()
def _values(module: nn.Module, quant: WeightQuant, transform: LayerTransform | None, weight: Tensor) -> nn.Parameter:
    fake = quant.fake_quantize(transformed_weight(module, transform, weight))
    return nn.Parameter(restored_weight(module, fake, transform), requires_grad=False)


def simulate_layer(layer: nn.Module, plan: LayerPlan, context: TimestepContext) -> nn.Module:
    """Turn one layer into its simulated quantized self, in place and for good.

    Args:
        layer: any module with a ``weight`` whose dimension 0 is the output channel.
        plan: what the plan says about it.
        context: the context attached to the denoiser.

    Returns:
        The same layer.
    """
    QuantizedLayer(layer).use(planned_state(layer, plan, context))
    return layer
