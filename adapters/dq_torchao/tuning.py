"""Integer or floating point, per layer, by measurement: a layer goes integer only where that pays.

Small or oddly shaped layers can be slower in integers: quantizing their input costs more than the multiplication saves.
Both forms of every layer are timed side by side at the shapes the denoiser calls it with; layers alike are timed once.
What is measured on a CPU is the time of the thread, until it is stable: a busy machine does not decide. A choice
depends on the machine all the same, so it is data: keep it, and apply it again for a bit-identical model.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dq_plugins.compiled import uncompiled
from dq_plugins.errors import PlanError
from dq_plugins.hooks import hooked
from dq_plugins.metrics.latency import Latency, compare_latency, thread_clock
from dq_plugins.plan import LayerPlan, QuantPlan
from dq_plugins.timesteps import TimestepContext
from dq_torchao.attention import time_attention
from dq_torchao.lowering import lower_layer, unsupported_reason
from dq_torchao.report import Timing
from dq_torchao.wrapped_forward import unwrapped_copy

ROUNDS = 7
WINDOW = ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding")


class InputLayout(NamedTuple):
    """What the speed of a layer depends on, of an input."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def random(self, device: torch.device) -> Tensor:
        """A random input of this layout; indices are 0."""
        # Stride 0 is an expanded dimension: filled once, then expanded again.
        stored = tuple(1 if stride == 0 else size for size, stride in zip(self.shape, self.stride, strict=True))
        x = torch.empty_strided(stored, self.stride, dtype=self.dtype, device=device)
        return (x.normal_() if self.dtype.is_floating_point else x.zero_()).expand(self.shape)


@torch.no_grad()
def tune(model: nn.Module, plan: QuantPlan, example_inputs: Mapping[str, Any]) -> dict[str, Timing]:
    """Time every layer and every attention that can run in integers, in eager mode, both ways.

    Args:
        model: the full-precision denoiser the plan was made for; it is left as it is.
        plan: the plan.
        example_inputs: keyword arguments of one call of the denoiser, of the batch and image size to be fast at.

    Returns:
        By layer, and by module that attends; for the ``choices`` of `dq_torchao.apply`. What the call does not reach is
        missing.
    """
    layers = {name: model.get_submodule(name) for name in plan.layers}
    candidates = {name: layer for name, layer in layers.items() if not unsupported_reason(layer, plan.layers[name])}
    layouts = record_layouts(model, candidates, example_inputs)
    known: dict[Hashable, Timing] = {}
    timings = {}
    for name, layer in candidates.items():
        if not layouts[name]:
            continue
        layer_plan = plan.layers[name]
        key = (layer_key(layer), layer_plan.width, layer_plan.features, tuple(layouts[name]))
        if key not in known:
            known[key] = time_layer(layer, layer_plan, plan, layouts[name])
        timings[name] = known[key]
    context = TimestepContext(plan.groups, "nearest")
    t = plan.schedule.timesteps[0]
    return timings | time_attention(model, plan.attention, context, t, example_inputs, rounds=ROUNDS)


def layer_key(layer: nn.Module) -> Hashable:
    """What the speed of a layer depends on, beside its inputs and widths."""
    window = tuple(str(getattr(layer, attribute, None)) for attribute in WINDOW)
    shape: Any = layer.weight.shape
    return type(layer), tuple(shape), getattr(layer, "bias", None) is None, window


def record_layouts(
    model: nn.Module, layers: Mapping[str, nn.Module], example_inputs: Mapping[str, Any]
) -> dict[str, list[InputLayout]]:
    """Layouts of the inputs of ``layers`` in one call of ``model``, by layer, in the order of the calls."""
    layouts: dict[str, list[InputLayout]] = {name: [] for name in layers}

    def record(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values())))
        layouts[name].append(InputLayout(tuple(x.shape), x.stride(), x.dtype))

    try:
        with hooked(layers, before=record), uncompiled(model):
            model(**example_inputs)
    except TypeError as error:
        raise PlanError(f"the example inputs do not fit {type(model).__name__}.forward: {error}") from error
    return layouts


def time_layer(layer: nn.Module, layer_plan: LayerPlan, plan: QuantPlan, layouts: list[InputLayout]) -> Timing:
    """Time both forms of one layer at the given inputs."""
    context = TimestepContext(plan.groups, "nearest")
    integer, floating = (unwrapped_copy(layer) for _ in range(2))
    lower_layer(integer, layer_plan, context)
    device = next(layer.parameters()).device
    with context.select(plan.schedule.timesteps[0]):
        calls = time_forms({"integer": integer, "floating": floating}, layouts, device, rounds=ROUNDS)
    return Timing(**{form: sum(latency.low for latency in latencies) for form, latencies in calls.items()})


def time_forms(
    forms: Mapping[str, nn.Module], layouts: Iterable[InputLayout], device: torch.device, *, rounds: int
) -> dict[str, list[Latency]]:
    """Time several forms of one layer side by side, at every given input.

    Returns:
        By form, a latency for each input.
    """
    found: dict[str, list[Latency]] = {name: [] for name in forms}
    for layout in layouts:
        x = layout.random(device)
        # Default arguments bind now: the lambdas outlive this turn of the loop.
        calls = {name: lambda x=x, form=form: form(x) for name, form in forms.items()}
        found_here = compare_latency(calls, rounds=rounds, warmup=1, clock=thread_clock(device), until_stable=True)
        for name, latency in found_here.items():
            found[name].append(latency)
    return found
