"""One layer that computes with a quantized weight and a quantized input: the wrapper that everything uses.

The module keeps its class, its name and its forward. Its weight is replaced by the values that the quantized layer
computes with, and its input passes through its ``input_quantizer`` first. Both are replaced by assignment: nothing is
computed when a run switches between widths, codes or ranges.

Shapes: ``G`` timestep groups, ``B`` samples of a call, ``N`` rows of a layer's input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dq_plugins.errors import PlanError
from dq_plugins.layer_kinds import kind_of
from dq_plugins.plan import LayerPlan, WeightQuant
from dq_plugins.quantized.input_quantizers import input_quantizer
from dq_plugins.quantized.layer_transform import (
    LayerTransform,
    restored_weight,
    transform_of,
    transformed_weight,
)
from dq_plugins.quantized.memory import give_back
from dq_plugins.quantized.output_correction import OutputCorrection
from dq_plugins.timesteps import TimestepContext

MUCH = 1 << 24
"""Bytes of a weight made for one call, after which free memory goes back to the system."""


class LayerState(NamedTuple):
    """What a layer computes with; the default is full precision.

    Attributes:
        weight: the values in place of its weight, on whatever they depend: codes, soft rounding, anything that may
            require gradients; or what makes them, called whenever the layer runs, which keeps none of them. None: its
            own.
        quantizer: what its input passes through: see `input_quantizer`, or any module from tensor to tensor.
        correction: what its output passes through: an `OutputCorrection`, or any module from tensor to tensor.
        branch: a part of its full-precision weight that meets the input as it comes, ``[O, C, ...]``; ``weight`` is the
            rest.
        inside: the branch meets what the quantizer's split holds back of the input, and is ``[O, r, ...]``.
    """

    weight: Tensor | Callable[[], Tensor] | None = None
    quantizer: nn.Module | None = None
    correction: nn.Module | None = None
    branch: Tensor | None = None
    inside: bool = False


class QuantizedLayer:
    """Puts a module into one state after another.

    A branch beside a quantized input is more input channels: the module multiplies ``[Q(x), x]`` by ``[w, branch]``, or
    ``[Q(x), a]``, with ``a`` the directions of the input that are not quantized; ``input_beside`` of the module says
    which, ``"whole"`` or ``"inside"``.

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
        module.input_beside = None  # type: ignore[assignment]
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
        beside = None if state.branch is None or state.quantizer is None else "inside" if state.inside else "whole"
        self.module.input_beside = beside  # type: ignore[assignment]
        self.module._modules["input_quantizer"] = state.quantizer
        self.module._modules["output_correction"] = state.correction

    def _weight(self, full: nn.Parameter, weight: Any, state: LayerState) -> nn.Parameter:
        if state.branch is None:
            return full if weight is None else weight
        if weight is None:
            weight = _without_directions(full, state.quantizer) if state.inside else full - state.branch
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
        if module.input_beside is None or kind is None:
            return quantizer(x)
        split = quantizer.split if module.input_beside == "inside" else None
        beside = x if split is None else split.inside(x, kind.channel_axis).to(x.dtype)
        return torch.cat([quantizer(x), beside], kind.channel_axis)

    if args:
        return (quantized(args[0]), *args[1:]), kwargs
    return args, {name: quantized(x) if place == 0 else x for place, (name, x) in enumerate(kwargs.items())}


def _without_directions(weight: Tensor, quantizer: Any) -> Tensor:
    return quantizer.split.outside(weight, 1).to(weight.dtype)


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
    values = correction = None
    transform = transform_of(plan)
    if plan.weight is not None:
        make = partial(_values, module, plan.weight, transform, weight)
        values = make if streamed and (transform is None or transform.branch(weight) is None) else make()
    kind = kind_of(module)
    quantizer = input_quantizer(
        plan.activation if quantize_inputs else None, context, module, weight.device, transform, plan.rows
    )
    if plan.bias_correction is not None and kind is not None:
        correction = OutputCorrection(plan.bias_correction, context, kind, weight.device, plan.rows)
    return LayerState(values, quantizer, correction, *state_of_branch(transform, weight, quantizer))


def state_of_branch(
    transform: LayerTransform | None, weight: Tensor, quantizer: nn.Module | None
) -> tuple[Tensor | None, bool]:
    """The last two fields of a `LayerState` with this quantizer, for a full-precision weight."""
    if transform is None:
        return None, False
    thin = quantizer is not None and transform.low_rank is None
    kept = transform.kept(weight) if thin else None
    return (transform.branch(weight), False) if kept is None else (kept.to(weight.dtype), True)


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
