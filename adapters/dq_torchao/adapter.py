"""Plan -> torchao: every layer of a denoiser lowered in place, and its forward routed by the timestep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dq_plugins.errors import PlanError
from dq_plugins.plan import QuantPlan
from dq_plugins.quantized import exact_tokens as tokens
from dq_plugins.quantized import temporal_table
from dq_plugins.timesteps import OutOfRange, TimestepContext, attach_context
from dq_torchao.checkpoint_config import CheckpointConfig, checkpoint_config_of, remember
from dq_torchao.lowering import lower_layer
from dq_torchao.report import Execution, Timing
from dq_torchao.timestep_state import install_timestep_state
from dq_torchao.tuning import tune

IMPLEMENTED = frozenset({temporal_table.SECTION, tokens.SECTION})
"""What this adapter can do of `QuantPlan.features`."""


def apply(
    model: nn.Module,
    plan: QuantPlan,
    *,
    out_of_range: OutOfRange = "error",
    temporal_fallback: temporal_table.Outside = "error",
    uniform_timesteps: bool = False,
    example_inputs: Mapping[str, Any] | None = None,
    choices: Mapping[str, Timing] | None = None,
) -> nn.Module:
    """Quantize ``model`` in place as ``plan`` says; layers that the kernels take run int8 x int8.

    `dq_torchao.execution_report` tells afterwards how each layer runs and why.

    Args:
        model: the full-precision denoiser the plan was made for.
        plan: the plan.
        out_of_range: what a timestep outside the calibrated range does: ``"error"``, or ``"nearest"`` group.
        temporal_fallback: what a timestep that the plan's temporal table lacks does: ``"error"``, or ``"live"``, which
            keeps the temporal block to compute it.
        uniform_timesteps: every call has one timestep for the whole batch, as sampling has. Makes compiled denoisers
            that take one timestep per sample (transformers, mostly) faster; a call with different ones is an error.
        example_inputs: keyword arguments of one call of the denoiser. With them every layer is timed (`tune`), and
            one that is slower in integers stays in floating point. Without, every layer that can run in integers does.
        choices: what `tune` returned earlier, instead of ``example_inputs``.

    Returns:
        ``model``.

    Raises:
        PlanError: the plan is of another model, or needs what this adapter does not implement.
    """
    if checkpoint_config_of(model) is not None:
        raise PlanError(
            f"this {type(model).__name__} is quantized already; apply a plan to the full-precision denoiser"
        )
    plan.check_model(model)
    if choices is None:
        choices = tune(model, plan, example_inputs) if example_inputs is not None else {}
    options: dict[str, Any] = {
        "out_of_range": out_of_range,
        "temporal_fallback": temporal_fallback,
        "uniform_timesteps": uniform_timesteps,
    }

    def lower(name: str, layer: nn.Module, context: TimestepContext) -> None:
        lower_layer(layer, plan.layers[name], context, choices.get(name))

    install(model, plan, lower, **options)
    remember(model, CheckpointConfig.of(model, plan, options))
    return model


def install(
    model: nn.Module,
    plan: QuantPlan,
    lower: Callable[[str, nn.Module, TimestepContext], object],
    *,
    out_of_range: OutOfRange = "error",
    temporal_fallback: temporal_table.Outside = "error",
    uniform_timesteps: bool = False,
) -> None:
    """Put everything that a plan brings into a denoiser: context, tables, layers, tokens; values come with ``plan``.

    Args:
        model: the denoiser, in full precision.
        plan: the plan.
        lower: makes one layer run as planned, given its name, the layer and the context.
        out_of_range: see `apply`.
        temporal_fallback: see `apply`.
        uniform_timesteps: see `apply`.

    Raises:
        PlanError: the plan needs what this adapter does not implement.
    """
    plan.refuse_unimplemented(IMPLEMENTED, TorchAOAdapter.name)
    model.requires_grad_(False)
    context = TimestepContext(plan.groups, out_of_range, uniform=uniform_timesteps)
    tabled = temporal_table.install_tables(model, plan, context, temporal_fallback)
    for name, layer_plan in plan.layers.items():
        layer: Any = model.get_submodule(name)
        if name in tabled:
            layer.execution = Execution("full precision", layer_plan.width, "temporal table", "", layer_plan.why)
        else:
            lower(name, layer, context)
    tokens.install_tokens(model, plan)
    install_timestep_state(model, context)
    attach_context(model, context, plan.timestep_argument)


class TorchAOAdapter:
    """Backend ``torchao`` of `dq_plugins.apply`."""

    name = "torchao"

    def apply(self, model: nn.Module, plan: QuantPlan, **options: Any) -> nn.Module:
        """Quantize ``model`` in place; the options are those of `dq_torchao.apply`."""
        return apply(model, plan, **options)
