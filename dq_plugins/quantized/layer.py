"""One layer that computes with a quantized weight and a quantized input: the wrapper that everything uses.

The module keeps its class, its name and its forward. Its weight is replaced by the values that the quantized layer
computes with, and its input passes through its ``input_quantizer`` first. Both are replaced by assignment: nothing is
computed when a run switches between widths, codes or ranges.

Shapes: ``G`` timestep groups, ``B`` samples of a call, ``N`` rows of a layer's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dq_plugins.affine import code_ranges, fake_quantize, integer_range, token_parameters
from dq_plugins.errors import PlanError
from dq_plugins.layer_kinds import kind_of
from dq_plugins.plan import ActivationQuant, DynamicActivationQuant, InputQuant, LayerPlan
from dq_plugins.quantized.balance import fake_weight, for_input
from dq_plugins.quantized.exact_state import ExactState
from dq_plugins.quantized.output_correction import OutputCorrection
from dq_plugins.quantized.straight_through import FakeQuantize
from dq_plugins.timesteps import TimestepContext, select_for_input


def quantize_input(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor,
    bits: int | Sequence[int | None],
    balance: Tensor | None = None,
) -> Tensor:
    """Simulated quantization of a layer's input by timestep group; gradients pass straight through.

    Dividing a channel by its balance before the quantizer and multiplying by it afterwards is quantizing it with the
    scale times the balance.

    Args:
        x: ``[N, ...]``.
        scale: ``[G]``; may require gradients, and so may the zero point.
        zero_point: ``[G]``, whole numbers.
        index: group of the call, of every sample or of every token: see `dq_plugins.timesteps.select_for_input`.
        bits: width of the code, or the widths of all groups, ``[G]``; None: floating point.
        balance: what the channels of ``x`` are divided by, as it broadcasts against ``x``.
    """
    s, z = (select_for_input(table.to(x.device), index.to(x.device), x) for table in (scale, zero_point))
    if balance is not None:
        s = s * balance.to(x.device)
    differentiable = torch.is_grad_enabled() and any(each.requires_grad for each in (x, s, z))
    quantize = FakeQuantize.apply if differentiable else fake_quantize
    if isinstance(bits, int):
        return quantize(x, s, z, *integer_range(bits))
    low, high, floating = (select_for_input(t.to(x.device), index.to(x.device), x) for t in code_ranges(bits))
    return torch.where(floating, x, quantize(x, s, z, low, high))


def quantize_tokens(x: Tensor, quant: DynamicActivationQuant, balance: Tensor | None = None) -> Tensor:
    """Simulated quantization of a linear layer's input by token; gradients pass straight through, ranges get none.

    Args:
        x: ``[..., C]``.
        quant: width and form.
        balance: what the channels of ``x`` are divided by before and multiplied by after, ``[C]``.
    """
    factors = None if balance is None else balance.to(x.device)
    values = x.float() if factors is None else x.float() * factors.reciprocal()
    known = values.detach()
    s, z = token_parameters(known, quant.bits, symmetric=quant.symmetric)
    values = fake_quantize(known, s, z, *integer_range(quant.bits)) + (values - known)
    return (values if factors is None else values * factors).to(x.dtype)


class TokenQuantizer(ExactState):
    """Simulated quantizer of a linear layer's input, each token by its own range.

    Args:
        quant: width and form.
        device: where the balance lives.
        balance: see `quantize_tokens`.
    """

    exact_state = ("balance",)

    balance: Tensor | None

    def __init__(self, quant: DynamicActivationQuant, device: torch.device, balance: Tensor | None = None) -> None:
        super().__init__()
        self.quant = quant
        self.register_buffer("balance", None if balance is None else balance.to(device, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x``."""
        return quantize_tokens(x, self.quant, self.balance)

    def extra_repr(self) -> str:
        """Width and form."""
        return f"{self.quant}, simulated"


class ActivationQuantizer(ExactState):
    """Simulated quantizer of one layer's input, with one (scale, zero point) per timestep group.

    The two buffers may be replaced at any time; one that requires gradients gets them.

    Args:
        quant: width, groups, and the parameters to start from.
        context: of the denoiser: it knows the group of the running call.
        device: where the parameters live.
        balance: what the channels of the input are divided by before and multiplied by after, as it broadcasts
            against the input.
    """

    exact_state = ("scale", "balance")

    scale: Tensor
    zero_point: Tensor
    balance: Tensor | None

    def __init__(
        self, quant: ActivationQuant, context: TimestepContext, device: torch.device, balance: Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("balance", None if balance is None else balance.to(device, copy=True))
        self.groups, self.bits, self.context = quant.groups, quant.bits, context
        self.group_bits = quant.group_bits
        self.register_buffer("scale", quant.scale.to(device, copy=True))
        self.register_buffer("zero_point", quant.zero_point.to(device, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x``."""
        index = self.context.index(self.groups)
        return quantize_input(x, self.scale, self.zero_point, index, self.group_bits or self.bits, self.balance)

    def extra_repr(self) -> str:
        """Width and groups."""
        return f"bits={self.group_bits or self.bits}, groups={self.groups!r} ({self.scale.numel()}), simulated"


InputQuantizer = ActivationQuantizer | TokenQuantizer


def input_quantizer(
    quant: InputQuant,
    context: TimestepContext,
    device: torch.device,
    balance: Tensor | None = None,
) -> InputQuantizer:
    """The simulated quantizer that a plan asks for; see the two classes."""
    if isinstance(quant, DynamicActivationQuant):
        return TokenQuantizer(quant, device, balance)
    return ActivationQuantizer(quant, context, device, balance)


class LayerState(NamedTuple):
    """What a layer computes with; the default is full precision.

    Attributes:
        weight: the values in place of its weight, on whatever they depend: codes, soft rounding, anything that may
            require gradients. None: its own.
        quantizer: what its input passes through: see `input_quantizer`, or any module from tensor to tensor.
        correction: what its output passes through: an `OutputCorrection`, or any module from tensor to tensor.
    """

    weight: Tensor | None = None
    quantizer: nn.Module | None = None
    correction: nn.Module | None = None


class QuantizedLayer:
    """Puts a module into one state after another.

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
        module.register_module("input_quantizer", None)
        module.register_module("output_correction", None)
        self._hooks = (
            module.register_forward_pre_hook(_quantize_input, with_kwargs=True),
            module.register_forward_hook(_correct_output),
        )

    def use(self, state: LayerState) -> None:
        """Compute with ``state`` from now on."""
        if self.full is not None:
            self.module._parameters["weight"] = self.full if state.weight is None else state.weight  # type: ignore[assignment]
        self.module._modules["input_quantizer"] = state.quantizer
        self.module._modules["output_correction"] = state.correction

    def remove(self) -> None:
        """Leave the module exactly as it was found."""
        self.use(LayerState())
        for hook in self._hooks:
            hook.remove()
        for name in ("input_quantizer", "output_correction"):
            del self.module._modules[name]


def _quantize_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    # Looked up on the module that runs, so that copies of it, and replicas on other devices, use their own.
    quantizer: Any = module.input_quantizer
    if quantizer is None:
        return None
    if args:
        return (quantizer(args[0]), *args[1:]), kwargs
    return args, {name: quantizer(x) if place == 0 else x for place, (name, x) in enumerate(kwargs.items())}


def _correct_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    correction: Any = module.output_correction
    return output if correction is None else correction(output)


@torch.no_grad()
def planned_state(
    module: nn.Module, plan: LayerPlan, context: TimestepContext, *, quantize_inputs: bool = True
) -> LayerState:
    """The state that a plan describes.

    Args:
        module: the full-precision layer.
        plan: what the plan says about it.
        context: the context attached to the denoiser.
        quantize_inputs: whether its input is quantized, where the plan says how.
    """
    weight: Any = module.weight
    values = quantizer = correction = None
    if plan.weight is not None:
        values = nn.Parameter(fake_weight(module, plan.weight, plan.balance), requires_grad=False)
    kind = kind_of(module)
    if plan.activation is not None and quantize_inputs:
        balance = for_input(module, plan.balance)
        quantizer = input_quantizer(plan.activation, context, weight.device, balance)
    if plan.bias_correction is not None and kind is not None:
        correction = OutputCorrection(plan.bias_correction, context, kind, weight.device)
    return LayerState(values, quantizer, correction)


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
