"""Calibration by sampling: observe layers while a pipeline runs, then make a plan and lower it.

`prepare` routes the denoiser's forward by its timestep argument, exactly as the quantized denoiser will be, and hooks
the layers. `convert` turns what they saw into a `QuantPlan` (optimal groups, one range per layer and group) and
applies it in place.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dq_plugins.affine import affine_parameters
from dq_plugins.compiled import uncompiled, unwrap
from dq_plugins.denoiser import require_full_precision
from dq_plugins.errors import CalibrationError
from dq_plugins.graph import find_timestep_argument
from dq_plugins.hashing import weights_hash
from dq_plugins.layer_kinds import kind_name
from dq_plugins.observers import optimal_groups
from dq_plugins.plan import ActivationQuant, LayerPlan, QuantPlan, Reason, Section, WeightQuant
from dq_plugins.quantized.weight_scale import weight_parameters, weight_rows
from dq_plugins.timesteps import (
    Schedule,
    Selection,
    TimestepContext,
    attach_context,
    context_of,
    detach_context,
    fit_to_input,
)
from dq_torchao.adapter import apply, begin, lower_planned
from dq_torchao.collecting import StatisticsStore
from dq_torchao.timestep_config import TimestepInt8Config

ERROR_POWER = {"mse": 2.0, "shrink": 2.4}
GROUPS = "all"


class CalibrationContext(TimestepContext):
    """The context of a denoiser that is being calibrated: layers report their inputs to it.

    Attributes:
        config: the configuration it was prepared with.
        argument: name of the timestep argument.
        store: what was seen.
        hooks: of the prepared layers, by name.
        lock: held while the store changes; threads may share the denoiser.
        uncompiled: closed when calibration ends; a denoiser compiled in place is compiled again then.
    """

    def __init__(self, config: TimestepInt8Config, argument: str) -> None:
        super().__init__({})
        self.config, self.argument = config, argument
        self.store = StatisticsStore()
        self.hooks: dict[str, Any] = {}
        self.lock = threading.Lock()
        self.uncompiled = ExitStack()

    @torch.compiler.disable  # a wrapper of torch.compile around the denoiser would trace how statistics are kept
    def selection_of(self, timestep: Tensor | float) -> Selection:
        """See `TimestepContext`; from now on the statistics of these timesteps are in memory."""
        selection = super().selection_of(timestep)
        with self.lock:
            self.store.open(selection.timestep.float().reshape(-1).tolist())
        return selection

    @torch.compiler.disable
    def observe(self, name: str, x: Tensor) -> None:
        """See the input of layer ``name``, at the timestep of the forward that is running."""
        t = self.timestep.float()
        if t.numel() > 1:  # each sample, or token, counts for its own timestep
            rows = fit_to_input(t, tuple(t.shape), x)
            parts = [(float(each), x[rows == each]) for each in rows.unique()]
        else:
            parts = [(float(t), x)]
        with self.lock:
            for timestep, part in parts:
                try:
                    self.store.update(name, timestep, part)
                except CalibrationError as error:
                    raise CalibrationError(f"input of layer {name!r} at timestep {timestep:g}: {error}") from error

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise CalibrationError("a denoiser that is being calibrated cannot be copied; convert it first")


def prepare(denoiser: nn.Module, layers: Iterable[nn.Module], config: TimestepInt8Config) -> CalibrationContext:
    """Observe ``layers`` whenever ``denoiser`` runs; its outputs stay those of full precision.

    Args:
        denoiser: the module whose forward takes the timestep.
        layers: some of its layers; may be called again for more.
        config: with ``step="prepare"``.

    Raises:
        PlanError: it is quantized already, by torchao itself for example.
        TimestepError: forward has no timestep argument.
    """
    denoiser = unwrap(denoiser)
    context = context_of(denoiser)
    if not isinstance(context, CalibrationContext):
        require_full_precision(denoiser)
        argument = find_timestep_argument(denoiser, config.timestep)
        context = CalibrationContext(config, argument)
        attach_context(denoiser, context, argument)
        context.uncompiled.enter_context(uncompiled(denoiser))
    names = {module: name for name, module in denoiser.named_modules()}
    for layer in layers:
        name = names[layer]
        if name not in context.hooks:
            context.hooks[name] = layer.register_forward_pre_hook(_observer(context, name), prepend=True)
    return context


def _observer(context: CalibrationContext, name: str) -> Any:
    def observe(_: nn.Module, args: tuple[Any, ...]) -> None:
        context.observe(name, args[0])

    return observe


def convert(denoiser: nn.Module) -> QuantPlan:
    """Quantize a calibrated ``denoiser`` in place.

    Returns:
        The plan it was quantized with.

    Raises:
        CalibrationError: it was not prepared, or did not run since.
        PlanError: something else has quantized it since.
    """
    denoiser = unwrap(denoiser)
    plan, options = _end_calibration(denoiser)
    apply(denoiser, plan, **options)
    return plan


def convert_layer(denoiser: nn.Module, name: str) -> None:
    """Quantize one layer of a calibrated ``denoiser`` in place; groups are shared, so the first call makes the plan.

    Args:
        denoiser: the calibrated denoiser.
        name: of the layer; nothing happens to one that was not prepared.

    Raises:
        CalibrationError: as `convert`.
        PlanError: as `convert`.
    """
    context = context_of(denoiser)
    if context is None or isinstance(context, CalibrationContext):
        plan, options = _end_calibration(denoiser)
        begin(denoiser, plan, **options)
    lower_planned(denoiser, name)


def _end_calibration(denoiser: nn.Module) -> tuple[QuantPlan, dict[str, Any]]:
    """Take the observers away; the plan, and the options to apply it with."""
    context = context_of(denoiser)
    if not isinstance(context, CalibrationContext):
        raise CalibrationError(
            f"this {type(denoiser).__name__} was not prepared: first quantize_(denoiser, TimestepInt8Config"
            '(step="prepare"), dq_torchao.linear_and_conv2d), then sample with it, then step="convert"'
        )
    if not context.store.timesteps:
        raise CalibrationError(
            f"this {type(denoiser).__name__} was prepared but has not run since, so nothing is known about its "
            "activations: sample with it (a few prompts) before converting it"
        )
    detach_context(denoiser)
    context.uncompiled.close()
    for hook in context.hooks.values():
        hook.remove()
    require_full_precision(denoiser)
    return make_plan(denoiser, context), {"out_of_range": context.config.out_of_range}


def make_plan(denoiser: nn.Module, context: CalibrationContext) -> QuantPlan:
    """The plan that follows from what the layers saw."""
    config, timesteps = context.config, context.store.timesteps
    power = ERROR_POWER[config.observer]
    tables = context.store.error_tables(context.hooks, config.act_bits, symmetric=config.symmetric, power=power)
    grouping = optimal_groups(tables, timesteps, max_groups=config.groups, bounds=validity(timesteps))
    ranges = grouping.ranges(config.groups)
    return QuantPlan(
        model=type(denoiser).__name__,
        model_hash=weights_hash(denoiser),
        timestep_argument=context.argument,
        schedule=Schedule(timesteps),
        groups={GROUPS: grouping.groups(config.groups)},
        layers={n: layer_plan(denoiser.get_submodule(n), ranges.get(n), config) for n in context.hooks},
        sections={"timestep-groups": Section({"curve": list(grouping.curve)})},
        recipe="quantize_",
    ).validate()


@torch.no_grad()
def layer_plan(layer: nn.Module, ranges: tuple[Tensor, Tensor] | None, config: TimestepInt8Config) -> LayerPlan:
    """The plan of one layer.

    Args:
        layer: the full-precision layer.
        ranges: ``low [G]`` and ``high [G]`` of its input; None when it never ran.
        config: the widths.
    """
    kind = kind_name(layer)
    if ranges is None:
        return LayerPlan(kind, unquantized_reason=Reason("it did not run during calibration", "unused"))
    # At 8 bits min-max loses nothing measurable, and the search takes a minute on a large denoiser.
    method = "minmax" if config.weight_bits >= 8 else "shrink"
    weight_scale, _ = weight_parameters(weight_rows(layer), config.weight_bits, method=method)
    scale, zero_point = affine_parameters(*ranges, config.act_bits, symmetric=config.symmetric)
    activation = ActivationQuant(config.act_bits, GROUPS, scale, zero_point)
    return LayerPlan(
        kind, weight=WeightQuant(config.weight_bits, weight_scale.cpu()), activation=activation, unquantized_reason=None
    )


def validity(timesteps: tuple[float, ...]) -> tuple[float, float]:
    """From and to which timestep the groups may be used: one step of the schedule beyond what was seen.

    A schedule of another length visits other timesteps between and slightly beyond the calibrated ones.
    """
    step = max((b - a for a, b in itertools.pairwise(timesteps)), default=math.inf)
    return timesteps[0] - step, timesteps[-1] + step
