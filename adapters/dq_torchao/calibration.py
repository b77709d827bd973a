"""Calibration by sampling: observe layers while a pipeline runs, then make a plan and lower it.

`prepare` routes the denoiser's forward by its timestep argument, exactly as the quantized denoiser will be, and hooks
the layers. `convert` hands what they saw to a recipe, which makes a `QuantPlan` of it as it does of recorded calls, and
applies it in place.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torchao.quantization.transform_module import register_quantize_module_handler

from dq_plugins import recipe as recipes
from dq_plugins import registry
from dq_plugins.calibration.call import bind, timestep_of
from dq_plugins.compiled import uncompiled, unwrap
from dq_plugins.errors import CalibrationError
from dq_plugins.full_precision import require_full_precision, require_values
from dq_plugins.graph import find_timestep_argument
from dq_plugins.graph.arguments import forward_signature, map_leaves
from dq_plugins.graph.row_order import find_row_orders
from dq_plugins.layer_kinds import kind_name, kind_of
from dq_plugins.plan import QuantPlan
from dq_plugins.quantized.sampled import SampledStatistics
from dq_plugins.quantized.statistics import Collector
from dq_plugins.timesteps import TimestepContext, attach_context, context_of, detach_context
from dq_torchao.adapter import apply, begin, lower_planned
from dq_torchao.layer_filter import denoiser_of_layer
from dq_torchao.timestep_config import TimestepInt8Config


class CalibrationContext(TimestepContext):
    """The context of a denoiser that is being calibrated: layers report their inputs to it.

    Attributes:
        config: the configuration it was prepared with.
        argument: name of the timestep argument.
        collector: what was seen.
        example: arguments of the first call.
        hooks: of the prepared layers, by name.
        watch: of the denoiser.
        uncompiled: closed when calibration ends; a denoiser compiled in place is compiled again then.
    """

    def __init__(self, config: TimestepInt8Config, argument: str) -> None:
        super().__init__({})
        self.config, self.argument = config, argument
        self.collector = Collector()
        self.example: dict[str, Any] | None = None
        self.probing = False
        self.hooks: dict[str, Any] = {}
        self.watch: Any = None
        self.uncompiled = ExitStack()

    @torch.compiler.disable  # a wrapper of torch.compile around the denoiser would trace how statistics are kept
    def observe(self, name: str, layer: nn.Module, x: Tensor) -> None:
        """See the input of layer ``name``, at the timestep of the forward that is running."""
        if not self.probing:
            kind = kind_of(layer)
            self.collector.see(name, x, self.selection.timestep, kind.spatial if kind else 0)

    @torch.compiler.disable
    def see_call(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of the first call, to find out from the denoiser's graph what its layers are for.

        At the first one of several timesteps, find out which rows of the layers' inputs belong to which sample.
        """
        if self.probing:
            return
        try:
            named = bind(forward_signature(denoiser), args, kwargs)
        except (CalibrationError, TypeError):  # arguments without names cannot be given again
            return
        if self.example is None:
            self.example = map_leaves(named, lambda _, x: x.detach().clone() if isinstance(x, Tensor) else x)
        if not self.collector.rows and timestep_of(named, self.argument).unique().numel() > 1:
            self.probing = True
            try:
                self.collector.rows = find_row_orders(denoiser, named, self.argument, "", self.hooks)
            finally:
                self.probing = False

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
        RegistryError: there is no such recipe.
        TimestepError: forward has no timestep argument.
    """
    denoiser = unwrap(denoiser)
    context = context_of(denoiser)
    if not isinstance(context, CalibrationContext):
        require_full_precision(denoiser)
        registry.get("recipe", config.recipe)  # a name that is unknown says so before anything is sampled
        argument = find_timestep_argument(denoiser, config.timestep)
        context = CalibrationContext(config, argument)
        attach_context(denoiser, context, argument)
        context.watch = denoiser.register_forward_pre_hook(context.see_call, with_kwargs=True)
        context.uncompiled.enter_context(uncompiled(denoiser))
    names = {module: name for name, module in denoiser.named_modules()}
    for layer in layers:
        name = names[layer]
        if name not in context.hooks:
            context.hooks[name] = layer.register_forward_pre_hook(_observer(context, name), prepend=True)
    return context


def _observer(context: CalibrationContext, name: str) -> Any:
    def observe(layer: nn.Module, args: tuple[Any, ...]) -> None:
        context.observe(name, layer, args[0])

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


@register_quantize_module_handler(TimestepInt8Config)
def handle_layer(layer: nn.Module, config: TimestepInt8Config) -> nn.Module:
    """torchao's handler: called once for every layer that the filter selects."""
    denoiser, name = denoiser_of_layer(
        layer, "TimestepInt8Config", "dq_torchao.prepare(denoiser, layers, config) and dq_torchao.convert(denoiser)"
    )
    if config.step == "prepare":
        prepare(denoiser, [layer], config)
    else:
        convert_layer(denoiser, name)
    return layer


def _end_calibration(denoiser: nn.Module) -> tuple[QuantPlan, dict[str, Any]]:
    """Take the observers away; the plan, and the options to apply it with."""
    context = context_of(denoiser)
    if not isinstance(context, CalibrationContext):
        raise CalibrationError(
            f"this {type(denoiser).__name__} was not prepared: first quantize_(denoiser, TimestepInt8Config"
            '(step="prepare"), dq_torchao.linear_and_conv2d), then sample with it, then step="convert"'
        )
    if not context.collector.timesteps:
        raise CalibrationError(
            f"this {type(denoiser).__name__} was prepared but has not run since, so nothing is known about its "
            "activations: sample with it (a few prompts) before converting it"
        )
    require_values(denoiser)
    detach_context(denoiser)
    context.uncompiled.close()
    for hook in (context.watch, *context.hooks.values()):
        hook.remove()
    require_full_precision(denoiser)
    return make_plan(denoiser, context), {"out_of_range": context.config.out_of_range}


def make_plan(denoiser: nn.Module, context: CalibrationContext) -> QuantPlan:
    """The plan that the recipe of the configuration makes of what the layers saw."""
    config = context.config
    names = dict(denoiser.named_modules())
    observed = {name: kind_name(names[name]) for name in context.hooks}
    recipe = registry.get("recipe", config.recipe)
    groups = {"timestep-groups": {"groups": config.groups}} if "timestep-groups" in recipe.passes() else {}
    return recipes.make_plan(
        denoiser,
        SampledStatistics(context.collector, observed, context.argument, context.example),
        recipe,
        weight_bits=config.weight_bits,
        act_bits=config.act_bits,
        symmetric_acts=config.symmetric,
        options=groups,
        progress=False,
    )
