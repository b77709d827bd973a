"""``quantize(pipe)``: record, plan and apply in one call, for who wants a smaller, faster pipeline and no theory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from dq_diffusers.denoisers import denoiser_of, denoisers_of
from dq_diffusers.recording import Drawn, sampler
from dq_diffusers.schedules import install_schedule
from dq_plugins.application import apply, executor
from dq_plugins.calibration import CalibrationSet, record
from dq_plugins.errors import DQError, DQWarning, NeverCalledError
from dq_plugins.full_precision import require_full_precision
from dq_plugins.plan import QuantPlan
from dq_plugins.recipe import Recipe, make_plan
from dq_plugins.scratch import Scratch

PROMPTS_NAME = "prompts.txt"


def quantize(
    pipe: Any,
    recipe: str | Recipe = "default",
    *,
    weight_bits: int = 8,
    act_bits: int | None = 8,
    prompts: Sequence[str] | None = None,
    class_labels: Sequence[int] | None = None,
    steps: int = 20,
    images: int = 8,
    batch: int = 4,
    guidance_scale: float | None = None,
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    backend: str = "torchao",
    prefer: Literal["smallest", "fastest"] = "smallest",
    workdir: str | Path | None = None,
    progress: bool = True,
    call: Mapping[str, Any] | None = None,
    draw: Callable[[Any], Any] | None = None,
    **backend_options: Any,
) -> QuantPlan | dict[str, QuantPlan]:
    """Quantize the denoiser of a pipeline in place; all of them where it has several.

    Several are experts for different timesteps (``transformer`` and ``transformer_2``), or a ControlNet beside a U-Net.
    Each gets a plan of its own, over the timesteps that it is called with; sampling runs once for each. One that
    sampling never calls stays in full precision, with a warning.

    Args:
        pipe: a full-precision diffusers pipeline.
        recipe: registered name (``dq-plugins list``), or a `dq_plugins.recipe.Recipe`.
        weight_bits: target width of weights.
        act_bits: target width of activations; None leaves them in floating point.
        prompts: what to draw for calibration; by default the lines of ``prompts.txt`` in the pipeline's folder.
        class_labels: classes to draw, for pipelines that take them; by default all in turn.
        steps: sampling steps of the calibration images; as many as you will sample with is best.
        images: calibration images.
        batch: images sampled at once.
        guidance_scale: weight of classifier-free guidance; the pipeline's default when None.
        seed: seed of the first image and of every random choice.
        options: options of passes, for example ``{"timestep-groups": {"groups": 4}}``.
        backend: registered adapter that executes the plan.
        prefer: with backend ``"torchao"``: ``"smallest"``, every layer that can runs in integers; ``"fastest"``, each
            is timed both ways on this machine, and what is faster in floating point stays there.
        workdir: folder for the calibration set and intermediate results. The same call resumes there after an
            interruption. By default a temporary folder.
        progress: show progress bars.
        call: whatever else the pipeline's call takes, by name: ``{"image": image, "strength": 0.6}``.
        draw: samples the calibration images itself, given the pipeline, instead of ``prompts``, ``call`` and the like.
            It must do the same every time: seed it inside.
        backend_options: options of the backend, for example ``out_of_range="nearest"``. With backend ``"torchao"``,
            ``uniform_timesteps`` is on unless given, where every recorded call had one timestep, as most pipelines'
            have: a compiled denoiser that knows this is faster. Pass False to call the denoiser with a timestep for
            each sample.

    Returns:
        The plan, to be saved, compared, or applied elsewhere; by component where there are several.

    Raises:
        DQError: the pipeline needs prompts and there are none, its denoiser is quantized already, or the recipe, an
            option or the backend cannot be used.

    Example::

        plan = dq_diffusers.quantize(pipe, weight_bits=4, prompts=["a red fox", "a lighthouse at night"])
        pipe.save_pretrained("quantized/")
    """
    if (tune := backend_options.pop("tune", None)) is not None:  # the option's former name
        prefer = "fastest" if tune else "smallest"
        warnings.warn(f"quantize(tune={tune}) is now prefer={prefer!r}", DeprecationWarning, stacklevel=2)
    executor(backend, backend_options)
    if prefer == "fastest" and backend != "torchao":
        raise DQError(f"prefer='fastest' chooses between integers and floating point, and {backend!r} runs no integers")
    denoisers = _full_precision_denoisers(pipe)
    arguments = {
        "prompts": prompts if prompts is not None or draw is not None else prompts_of(pipe),
        "class_labels": class_labels,
        "steps": steps,
        "seed": seed,
        "images": images,
        "batch": min(batch, images),
        "guidance_scale": guidance_scale,
    }
    recipe_options: dict[str, Any] = {"weight_bits": weight_bits, "act_bits": act_bits, "seed": seed}
    recipe_options |= {"options": options, "progress": progress}
    plans: dict[str, QuantPlan] = {}
    found: dict[str, dict[str, Any]] = {}  # options of the backend that the recorded calls decide
    with Scratch("quantize") as temporary:
        for name, denoiser in denoisers.items():
            place = Path(temporary if workdir is None else workdir) / (name if len(denoisers) > 1 else "")
            sample = _sampler(pipe, name, draw, arguments | dict(call or {}))
            try:
                calibration = record(denoiser, sample, place / "calib", progress=progress)
            except NeverCalledError:
                if len(denoisers) == 1:
                    raise
                warnings.warn(f"sampling never called {name!r}: it stays in full precision", DQWarning, stacklevel=2)
                continue
            work = None if workdir is None else place / "work"
            plans[name] = make_plan(denoiser, calibration, recipe, workdir=work, **recipe_options)
            found[name] = _decided_by_calls(calibration, prefer) if backend == "torchao" else {}
    for name, plan in plans.items():  # after all were recorded in full precision
        denoiser = denoisers[name].eval().requires_grad_(False)
        apply(denoiser, plan, backend, inplace=True, **found[name] | backend_options)
        install_schedule(pipe, plan)
    return next(iter(plans.values())) if len(denoisers) == 1 else plans


def _full_precision_denoisers(pipe: Any) -> dict[str, nn.Module]:
    """All denoisers of a pipeline by component, of which none may be quantized."""
    denoiser_of(pipe)  # raises where there is none
    denoisers = denoisers_of(pipe)
    for denoiser in denoisers.values():
        require_full_precision(denoiser)
    return denoisers


def _sampler(
    pipe: Any, component: str, draw: Callable[[Any], Any] | None, arguments: Mapping[str, Any]
) -> Callable[[nn.Module], Any]:
    """What samples the calibration images with one denoiser: the caller's own, or a call with these arguments."""
    if draw is not None:
        return Drawn(pipe, component, draw)
    return sampler(pipe, **{"component": component, **arguments})


def _decided_by_calls(calibration: CalibrationSet, prefer: str) -> dict[str, Any]:
    """Options of the backend ``"torchao"`` that the recorded calls decide."""
    found: dict[str, Any] = {"uniform_timesteps": calibration.uniform}
    return found | ({"prefer": prefer, "example_inputs": calibration.example_inputs()} if prefer == "fastest" else {})


def prompts_of(pipe: Any) -> list[str] | None:
    """Prompts that come with a pipeline: the lines of ``prompts.txt`` in the folder it was loaded from."""
    file = Path(str(getattr(pipe.config, "_name_or_path", None) or ".")) / PROMPTS_NAME
    if not file.is_file():
        return None
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()] or None
