"""Run a recipe: from a denoiser and its calibration set to a plan, resumable pass by pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from dq_plugins import registry
from dq_plugins.calibration import CalibrationSet
from dq_plugins.compiled import uncompiled, unwrap
from dq_plugins.errors import DQError, RecipeError, RegistryError
from dq_plugins.full_precision import require_full_precision, require_uncached
from dq_plugins.hashing import weights_hash
from dq_plugins.layer_kinds import kind_of
from dq_plugins.plan import LayerPlan, PassRecord, QuantPlan, Reason, Targets
from dq_plugins.progress import Progress
from dq_plugins.provenance import library_code, plugin_code
from dq_plugins.quantized.layer_transform import transforms_of
from dq_plugins.quantized.memory import codes_where, give_back
from dq_plugins.quantized.sampled import SampledStatistics
from dq_plugins.recipe.definition import Recipe
from dq_plugins.recipe.pass_context import PassContext
from dq_plugins.recipe.pass_protocol import Pass
from dq_plugins.recipe.results import StepResults
from dq_plugins.recipe.run_settings import RunSettings
from dq_plugins.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Iterator


log = logging.getLogger(__name__)

Source = CalibrationSet | SampledStatistics
NEVER_RUN = Reason("the traced forward never runs it", "unused")
RECURRENT = Reason(
    "a recurrent layer feeds what it computes back into its own products, inside one operator of PyTorch's",
    "unsupported",
)


def empty_plan(context: PassContext, recipe: str) -> QuantPlan:
    """A plan that lists every layer of the denoiser and quantizes none."""
    layers = {
        name: LayerPlan(kind=info.kind, roles=frozenset(info.roles), rows=context.row_orders.get(name))
        for name, info in context.partition.layers.items()
    }
    for name, reason in context.left_out.items():
        layers[name] = LayerPlan(context.traced.layers[name].kind, unquantized_reason=reason)
    for name, module in context.denoiser.named_modules():
        if (kind := kind_of(module)) and name not in layers:
            sampled = isinstance(context.calibration, SampledStatistics)
            reason = context.calibration.left_out(name) if sampled else NEVER_RUN
            layers[name] = LayerPlan(kind.name, unquantized_reason=reason or NEVER_RUN)
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase) and name not in layers:
            layers[name] = LayerPlan(type(module).__name__.lower(), unquantized_reason=RECURRENT)
    return QuantPlan(
        model=type(context.denoiser).__name__,
        model_hash=weights_hash(context.denoiser),
        timestep_argument=context.calibration.timestep_argument,
        schedule=context.calibration.schedule,
        layers=dict(sorted(layers.items())),
        recipe=recipe,
        seed=context.seed,
        targets=context.targets,
        tracer=context.traced.graph.graph.get("tracer", ""),
    )


@contextmanager
def _frozen(denoiser: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients on the parameters, restored afterwards."""
    training = denoiser.training
    required = [p for p in denoiser.parameters() if p.requires_grad]
    denoiser.eval().requires_grad_(False)
    try:
        yield
    finally:
        denoiser.train(training)
        for parameter in required:
            parameter.requires_grad_(True)


def _chosen_calls(calibration: Source, plan: QuantPlan) -> Source:
    """The calls that the plan says to calibrate on, so that a run that resumes sees the same ones."""
    chosen = plan.calibration_calls
    if chosen is None:
        return calibration
    return calibration.subset(per_timestep=dict(zip(chosen.timesteps, chosen.visits, strict=True)))


@contextmanager
def _resuming(name: str, folder: Path | None) -> Iterator[None]:
    """Say so where a pass fails that went on from results of an earlier run: they may have been altered."""
    resumes = folder is not None and folder.is_dir() and any(folder.iterdir())
    try:
        yield
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if not resumes or isinstance(error, DQError | torch.OutOfMemoryError):
            raise
        raise RecipeError(
            f"pass {name!r} could not go on from the intermediate results in {folder} ({type(error).__name__}: "
            f"{error}). Where they were altered or damaged, delete that folder; the same command then begins the pass "
            "again."
        ) from error


def _run_pass(instance: Pass, plan: QuantPlan, context: PassContext, progress: bool) -> None:
    """One pass, and a note of it in the plan."""
    name, began = context.running, time.perf_counter()
    with _resuming(name, context.workdir):
        _run_steps(instance, plan, context, progress)
    log.info("pass %s took %.1f s", name, time.perf_counter() - began)
    provider = plugin_code(registry.find("pass", name)) or None
    plan.passes.append(PassRecord(name, instance.options.model_dump(mode="json"), provider))


def _run_steps(instance: Pass, plan: QuantPlan, context: PassContext, progress: bool) -> None:
    running = instance.run(plan, context)
    if running is None:
        return
    with tqdm(desc=instance.name, disable=not progress, leave=False) as bar:
        for step in running:
            if not isinstance(step, Progress):
                raise RecipeError(f"pass {instance.name!r} yields {step!r} where Progress(done, total, what) belongs")
            bar.total = step.total
            bar.set_postfix_str(step.what, refresh=False)
            bar.update(step.done - bar.n)


def passes_of(recipe: str | Recipe, options: Mapping[str, Mapping[str, Any]]) -> tuple[Recipe, list[Pass]]:
    """A recipe with options overridden, and its passes ready to run; the errors are those of `make_plan`."""
    recipe = recipe if isinstance(recipe, Recipe) else _registered_recipe(recipe)
    recipe = recipe.with_options(options)
    classes = {name: _pass_class(name) for name in recipe.passes()}
    recipe.check_order(classes)
    return recipe, [classes[step.name](**step.options) for step in recipe.steps]


def _registered_recipe(name: str) -> Recipe:
    """A recipe by name; `RegistryError` where what is registered under it is none."""
    found = registry.get("recipe", name)
    if not isinstance(found, Recipe):
        raise RegistryError(f"what {registry.find('recipe', name).origin} registers as recipe {name!r} is no Recipe")
    return found


def _pass_class(name: str) -> type[Pass]:
    found = registry.get("pass", name)
    if not (isinstance(found, type) and issubclass(found, Pass)):
        origin = registry.find("pass", name).origin
        raise RegistryError(f"what {origin} registers as pass {name!r} is no subclass of dq_plugins.Pass: {found!r}")
    return found


def make_plan(
    denoiser: nn.Module,
    calibration: CalibrationSet | SampledStatistics | str | Path,
    recipe: str | Recipe = "default",
    *,
    weight_bits: int = 8,
    act_bits: int | None = 8,
    edge_bits: int | None = None,
    condition_bits: int | None = None,
    symmetric_weights: bool | None = None,
    symmetric_acts: bool | None = None,
    weight_group_size: int | None = None,
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    workdir: str | Path | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> QuantPlan:
    """Run a recipe's passes on a denoiser.

    Same denoiser, calibration set, recipe, options and seed: the same plan, byte for byte.

    Args:
        denoiser: full-precision denoiser; any ``nn.Module`` whose forward takes a timestep.
        calibration: calls recorded by `dq_plugins.record` from this denoiser, or their folder; or statistics that were
            collected while sampling, for recipes whose passes need no more.
        recipe: registered name, or a `Recipe`.
        weight_bits: target width of weights; passes may give single layers more or fewer.
        act_bits: target width of activations; None leaves them in floating point.
        edge_bits: least width of weights and inputs of the first and last layers; None: the recipe's, mostly 8.
        condition_bits: least width of inputs of layers that depend on timestep and conditions alone; None: the
            recipe's.
        symmetric_weights: whether weights have zero point 0; None: the recipe's, mostly yes.
        symmetric_acts: whether inputs have zero point 0; None: the recipe's, mostly no.
        weight_group_size: input channels that share a scale of a weight of few bits; None: the recipe's, mostly all.
        seed: seed of every random choice.
        options: overrides by pass name, for example ``{"timestep-groups": {"groups": 4}}``.
        workdir: folder for intermediate results. The same call with the same folder resumes after an interruption.
        out: folder for the plan (`QuantPlan.load` reads it); by default it is only returned. Intermediate results lie
            in ``out/work`` until the plan is whole, unless ``workdir`` is given. The same call resumes there as well.
        progress: show a progress bar.

    Returns:
        The plan.

    Raises:
        RegistryError: unknown recipe or pass.
        RecipeError: wrong options or order, or the folder holds intermediate results of other settings.
        DQError: another process works in that folder.
        CalibrationError: the calibration set is of another model.
        PlanError: the denoiser is quantized already, or there is no such width.
    """
    require_full_precision(denoiser)
    denoiser = unwrap(denoiser)
    calibration = _opened(calibration, denoiser)
    recipe, passes = passes_of(recipe, options or {})
    model_hash = weights_hash(denoiser)
    calibration.check_model(model_hash)
    given = {
        "edge_bits": edge_bits,
        "condition_bits": condition_bits,
        "symmetric_weights": symmetric_weights,
        "symmetric_acts": symmetric_acts,
        "weight_group_size": weight_group_size,
    }
    chosen = {**recipe.targets, **{name: value for name, value in given.items() if value is not None}}
    context = PassContext(denoiser, calibration, Targets(weight_bits, act_bits, **chosen), seed)
    # of the whole run: a pass that finds no statistics after an interruption must collect the same again
    limits = (each.statistics_samples for each in passes)
    context.statistics_samples = min((limit for limit in limits if limit is not None), default=None)
    mapped = codes_where(denoiser)
    scratch = Scratch("plan") if mapped and workdir is None and out is None else nullcontext(workdir)
    with ExitStack() as stack:
        settings = _run_settings(recipe, passes, context, model_hash)
        results = StepResults(stack.enter_context(scratch), settings, out, mapped)
        for each in (results.opened(), _frozen(denoiser), torch.no_grad(), uncompiled(denoiser)):
            stack.enter_context(each)
        done, plan = results.last()
        plan = plan or empty_plan(context, recipe.name)
        for step, each in enumerate(passes[done:], done):
            context.running, context.workdir = recipe.steps[step].name, results.folder(step)
            context.transforms = transforms_of(plan.layers)
            context.calibration = _chosen_calls(calibration, plan)
            _run_pass(each, plan, context, progress)
            results.keep(step, plan)
            if mapped:
                give_back()
        if weights_hash(denoiser) != model_hash:
            raise RecipeError(f"a pass of recipe {recipe.name!r} changed the denoiser's weights; passes only read them")
        results.finish(plan.validate())
    return plan


def _opened(calibration: Source | str | Path, denoiser: nn.Module) -> Source:
    """Recorded calls, of a denoiser that can repeat them, or statistics."""
    if isinstance(calibration, str | Path):
        calibration = CalibrationSet.open(calibration)
    if isinstance(calibration, CalibrationSet):
        require_uncached(denoiser)
    return calibration


def _run_settings(recipe: Recipe, passes: list[Pass], context: PassContext, model_hash: str) -> RunSettings:
    names = recipe.passes()
    code = {f"pass {name}": plugin_code(registry.find("pass", name)) for name in names}
    return RunSettings(
        weights=model_hash,
        calibration=context.calibration.hash,
        targets=context.targets,
        seed=context.seed,
        passes=names,
        options=[each.options.model_dump(mode="json") for each in passes],
        code={**library_code(), **{name: found for name, found in code.items() if found}},
    )
