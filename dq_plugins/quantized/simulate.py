"""Plain fake quantization of a plan: the reference every integer execution is compared with.

Each planned layer keeps its class and its name. Its weight is replaced by the values the quantized layer computes
with, and a pre-hook quantizes its input with the parameters of the current timestep group.

Shapes: ``G`` timestep groups, ``B`` samples in the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.affine import fake_quantize, integer_range
from dq_plugins.errors import PlanError
from dq_plugins.plan import ActivationQuant, LayerPlan, QuantPlan
from dq_plugins.quantized import exact_tokens as tokens
from dq_plugins.quantized import temporal_table
from dq_plugins.timesteps import OutOfRange, TimestepContext, attach_context, select_for_input

IMPLEMENTED = frozenset({temporal_table.SECTION, tokens.SECTION})


class ActivationQuantizer(nn.Module):
    """Simulated quantizer of one layer's input, with one (scale, zero point) per timestep group."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quant: ActivationQuant, context: TimestepContext, device: torch.device) -> None:
        super().__init__()
        self.groups, self.bits, self.context = quant.groups, quant.bits, context
        self.register_buffer("scale", quant.scale.to(device, copy=True))
        self.register_buffer("zero_point", quant.zero_point.to(device, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x``."""
        index = self.context.index(self.groups).to(self.scale.device)
        scale, zero_point = (select_for_input(t, index, x) for t in (self.scale, self.zero_point))
        return fake_quantize(x, scale, zero_point, *integer_range(self.bits))

    def extra_repr(self) -> str:
        """Width and groups."""
        return f"bits={self.bits}, groups={self.groups!r} ({self.scale.numel()}), simulated"


def _quantize_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.input_quantizer(args[0]), *args[1:])  # type: ignore[operator]


def simulate_layer(layer: nn.Module, plan: LayerPlan, context: TimestepContext) -> nn.Module:
    """Turn one layer into its simulated quantized self, in place.

    Args:
        layer: any module with a ``weight`` whose dimension 0 is the output channel.
        plan: what the plan says about it.
        context: the context attached to the denoiser.

    Returns:
        The same layer.
    """
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise PlanError(f"a {type(layer).__name__} has no weight tensor, so it cannot be quantized")
    if plan.weight is not None:
        with torch.no_grad():
            fake = plan.weight.fake_quantize(weight)
        layer.weight = nn.Parameter(fake, requires_grad=False)
    if plan.activation is not None:
        layer.input_quantizer = ActivationQuantizer(plan.activation, context, weight.device)
        layer.register_forward_pre_hook(_quantize_input)
    return layer


class SimulateAdapter:
    """Backend ``simulate``: fake quantization in plain PyTorch, no framework, no speed-up."""

    name = "simulate"

    def apply(
        self,
        model: nn.Module,
        plan: QuantPlan,
        *,
        out_of_range: OutOfRange = "error",
        temporal_fallback: temporal_table.Outside = "error",
    ) -> nn.Module:
        """Simulate ``plan`` on ``model`` in place.

        Args:
            model: the full-precision denoiser the plan was made for.
            plan: the plan.
            out_of_range: ``"error"`` or ``"nearest"`` for timesteps outside the calibrated range.
            temporal_fallback: ``"error"`` or ``"live"`` for timesteps outside the temporal table.
        """
        plan.refuse_unimplemented(IMPLEMENTED, self.name)
        plan.check_model(model)
        model.requires_grad_(False)
        context = TimestepContext(plan.groups, out_of_range)
        tabulated = temporal_table.install_tables(model, plan, context, temporal_fallback)
        for name, layer_plan in plan.layers.items():
            if name not in tabulated and layer_plan.quantized:
                simulate_layer(model.get_submodule(name), layer_plan, context)
        tokens.install_tokens(model, plan)
        attach_context(model, context, plan.timestep_argument)
        return model
