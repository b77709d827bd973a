"""Plan -> torchao: layers of a denoiser lowered in place, and its forward routed by the timestep.

`begin` gives the denoiser what concerns all of it, and `lower_planned` lowers one layer, for torchao's ``quantize_``
hands out layers one at a time. `apply` is both, for every layer of the plan.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from dq_plugins.compiled import unwrap
from dq_plugins.errors import DQWarning, PlanError
from dq_plugins.plan import LayerPlan, QuantPlan
from dq_plugins.quantized.attention import MakeSite, QuantizedAttention
from dq_plugins.quantized.installation import install_plan
from dq_plugins.quantized.table_lookup import Outside
from dq_plugins.timesteps import NonFinite, OutOfRange, TimestepContext, context_of
from dq_torchao.attention import lower_attention
from dq_torchao.checkpoint_config import CheckpointConfig, checkpoint_config_of, remember
from dq_torchao.columns import enlist, enlist_all
from dq_torchao.kernels import merging
from dq_torchao.kernels.gelu import take_gelu
from dq_torchao.lowering import lower_layer, mark_full_precision
from dq_torchao.report import Execution, Timing
from dq_torchao.timestep_state import install_timestep_state
from dq_torchao.tuning import tune

IMPLEMENTED = frozenset(
    {
        "balance",
        "bias_correction",
        "dynamic_group_widths",
        "dynamic_ranges",
        "clipped_ranges",
        "group_scale",
        "group_widths",
        "low_rank",
        "rotation",
        "row_order",
        "subspace",
    }
)
"""What layers of this adapter can do of `QuantPlan.features`."""

Prefer = Literal["smallest", "fastest"]

NOTHING_GAINED = (
    "prefer='fastest' gains nothing: none of the {count} layers and attentions that can run in integers is faster so "
    "on this machine, and all stay in floating point. prefer='smallest' stores their weights in integers"
)
NOT_SELECTED = "the filter of quantize_ did not select it"
PENDING = "dq_pending"
"""Attribute of a denoiser that a plan is being applied to."""


def apply(
    model: nn.Module,
    plan: QuantPlan,
    *,
    out_of_range: OutOfRange = "error",
    temporal_fallback: Outside = "error",
    uniform_timesteps: bool = False,
    non_finite: NonFinite = "nan",
    prefer: Prefer = "smallest",
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
        non_finite: what NaN or infinity among the arguments of a call does: ``"nan"`` makes that sample's output NaN,
            ``"error"`` raises.
        prefer: ``"smallest"``: every layer and attention that can runs in integers. ``"fastest"``: each is timed both
            ways on this machine (`tune`), and what is faster in floating point stays there. Everywhere else that
            there is such a choice, its name and its default are these.
        example_inputs: keyword arguments of one call of the denoiser, for ``"fastest"``.
        choices: what `tune` returned earlier; it decides instead.

    Returns:
        ``model``.

    Raises:
        PlanError: the plan is of another model, or needs what this adapter does not implement; ``"fastest"`` without
            ``example_inputs``, or these without it.
    """
    inside = unwrap(model)
    _check(inside, plan)
    if choices is None:
        choices = _measured(inside, plan, prefer, example_inputs)
    options: dict[str, Any] = {
        "out_of_range": out_of_range,
        "temporal_fallback": temporal_fallback,
        "uniform_timesteps": uniform_timesteps,
        **({"non_finite": non_finite} if non_finite != "nan" else {}),
    }
    _begin(inside, plan, options, choices)
    for name in plan.layers:
        lower_planned(inside, name, choices.get(name))
    return model


def _measured(
    model: nn.Module, plan: QuantPlan, prefer: Prefer, example_inputs: Mapping[str, Any] | None
) -> Mapping[str, Timing]:
    if prefer not in ("smallest", "fastest"):
        raise PlanError(f"prefer is 'smallest' or 'fastest', got {prefer!r}")
    if (prefer == "fastest") != (example_inputs is not None):
        raise PlanError("prefer='fastest' times layers at example_inputs: give both, or neither")
    if example_inputs is None:
        return {}
    timings = tune(model, plan, example_inputs)
    if not any(timing.integer_pays for timing in timings.values()):
        warnings.warn(NOTHING_GAINED.format(count=len(timings)), DQWarning, stacklevel=3)
    return timings


@dataclass
class Pending:
    """What of a plan has not been lowered yet; an attribute of the denoiser.

    Attributes:
        plan_hash: hash of the plan.
        layers: its decisions for layers that still run in full precision, by name.
    """

    plan_hash: str
    layers: dict[str, LayerPlan]


def begin(model: nn.Module, plan: QuantPlan, **options: Any) -> None:
    """Do all that a plan asks of a denoiser except for its quantized layers, which `lower_planned` lowers one by one.

    The denoiser runs, and can be saved, at any point between.

    Args:
        model: the full-precision denoiser the plan was made for.
        plan: the plan.
        options: ``out_of_range``, ``temporal_fallback``, ``uniform_timesteps``; see `apply`.

    Raises:
        PlanError: the plan is of another model, or needs what this adapter does not implement.
    """
    _check(model, plan)
    _begin(model, plan, options)


def _begin(
    model: nn.Module, plan: QuantPlan, options: dict[str, Any], choices: Mapping[str, Timing] = MappingProxyType({})
) -> None:
    pending: dict[str, LayerPlan] = {}

    def note(name: str, layer: nn.Module, context: TimestepContext) -> None:
        if plan.layers[name].quantized:
            pending[name] = plan.layers[name]
        mark_full_precision(layer, plan.layers[name], NOT_SELECTED)

    def attend(name: str, module: nn.Module, *decided: Any) -> QuantizedAttention | None:
        return lower_attention(module, *decided, choices.get(name))

    install(model, plan, note, attend, **options)
    object.__setattr__(model, PENDING, Pending(plan.hash, pending))
    remember(model, CheckpointConfig.of(model, plan, options))


def begun_with(model: nn.Module, plan_hash: str) -> bool:
    """Whether `begin` was called for ``model`` with the plan of this hash."""
    pending = model.__dict__.get(PENDING)
    return isinstance(pending, Pending) and pending.plan_hash == plan_hash


def lower_planned(model: nn.Module, name: str, timing: Timing | None = None) -> None:
    """Lower one layer of a denoiser that `begin` was called for, in place.

    Args:
        model: the denoiser.
        name: of the layer; nothing happens where the plan leaves it as it is, or it is lowered already.
        timing: see `lower_layer`.
    """
    pending, context = model.__dict__[PENDING].layers, context_of(model)
    if name not in pending:
        return
    assert context is not None
    lower_layer(model.get_submodule(name), pending[name], context, timing)
    enlist(model, name)
    del pending[name]
    config = checkpoint_config_of(model)
    assert config is not None
    config.note_layer(model, name)


def _check(model: nn.Module, plan: QuantPlan) -> None:
    if checkpoint_config_of(model) is not None:
        raise PlanError(
            f"this {type(model).__name__} is quantized already; apply a plan to the full-precision denoiser"
        )
    plan.check_model(model)


def install(
    model: nn.Module,
    plan: QuantPlan,
    lower: Callable[[str, nn.Module, TimestepContext], object],
    make_attention: MakeSite,
    **options: Any,
) -> None:
    """Put everything that a plan brings into a denoiser whose weights need not be there yet.

    Args:
        model: the denoiser, in full precision.
        plan: the plan.
        lower: makes one layer run as planned, given its name, the layer and the context.
        make_attention: makes a module's attention run as planned.
        options: ``out_of_range``, ``temporal_fallback``, ``uniform_timesteps``; see `apply`.

    Raises:
        PlanError: the plan needs what this adapter does not implement.
    """

    def lower_all(layers: Iterable[str], context: TimestepContext) -> None:
        for name in layers:
            lower(name, model.get_submodule(name), context)

    model.requires_grad_(False)
    context = install_plan(
        model,
        plan,
        lower_all,
        adapter=TorchAOAdapter.name,
        implemented=IMPLEMENTED,
        make_attention=make_attention,
        check_weights=False,
        **options,
    )
    for name in plan.tabulated:
        layer: Any = model.get_submodule(name)
        layer.execution = Execution(
            "full precision", plan.layers[name].width, "temporal table", "", plan.layers[name].why
        )
    install_timestep_state(model, context)
    enlist_all(model)
    take_gelu(model)
    merging.install()


class TorchAOAdapter:
    """Backend ``torchao``: int8 products, eager and compiled; packed weights of 1 to 8 bits."""

    name = "torchao"

    apply = staticmethod(apply)
