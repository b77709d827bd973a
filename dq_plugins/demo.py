"""The main job, end to end on a bundled denoiser: sample, calibrate, plan, quantize, sample again, compare.

Every figure is measured in the run that prints it.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dq_plugins.application import apply
from dq_plugins.bundled_denoisers import bundled
from dq_plugins.calibration import CalibrationSet, record
from dq_plugins.compiling import compiling
from dq_plugins.graph import partition
from dq_plugins.libraries import adapter, load_denoiser
from dq_plugins.metrics.image import psnr
from dq_plugins.metrics.latency import Latency, compare_latency
from dq_plugins.metrics.output_error import output_errors
from dq_plugins.metrics.size import state_bytes
from dq_plugins.plan import QuantPlan
from dq_plugins.progress import on_terminal
from dq_plugins.quantized.statistics import collect
from dq_plugins.recipe import make_plan
from dq_plugins.report.block_graph import block_figure
from dq_plugins.report.demo_page import DemoResult, Ranges
from dq_plugins.report.execution import executions
from dq_plugins.report.machine import machine_facts

PROMPTS = {
    "emoji": ("fox face", "panda face", "frog face", "sunflower", "octopus", "parrot", "mushroom", "turtle"),
}

SECONDS = {
    "load": 1.0,
    "record": 9.0,
    "plan": 75.0,
    "reference": 8.0,
    "apply": 8.0,
    "errors": 3.0,
    "eager": 5.0,
    "compiled": 180.0,
    "report": 8.0,
}
"""A guess of what each stage takes with ``default``: of runs on one thread, beside other work. The
proportions count, because the estimate scales them by what the finished stages took."""
SHARES = {"fast": 0.1, "default": 1.0}
"""Of the planning of ``default``; of other recipes nothing is guessed."""


def expected_seconds(model: str, recipe: str, *, compiled: bool) -> dict[str, float]:
    """A guess of the seconds of each stage of the demo, in order; empty where there is none."""
    if recipe not in SHARES:
        return {}
    found = SECONDS if compiled else {stage: s for stage, s in SECONDS.items() if stage != "compiled"}
    return {**found, "plan": found["plan"] * SHARES[recipe]}


def best_threads(model: str) -> int:
    """One thread, or as many as PyTorch takes: what calls a bundled denoiser faster here.

    They are small, and threads that wait for each other on a machine that others use are many times slower than one.
    """
    most = torch.get_num_threads()
    pipe, denoiser = load_denoiser(bundled(model))
    sample = adapter("diffusers").sampler(pipe, steps=1, images=8, batch=8)
    seconds: dict[int, float] = {}
    try:
        for count in (1, 1, most) if most > 1 else ():  # the first call also allocates
            torch.set_num_threads(count)
            began = time.perf_counter()
            sample(denoiser)
            seconds[count] = time.perf_counter() - began
    finally:
        torch.set_num_threads(most)
    return min(seconds, key=seconds.__getitem__, default=most)


def run_demo(
    out: Path,
    model: str = "emoji",
    *,
    steps: int = 20,
    calibration_images: int = 16,
    images: int = 8,
    groups: int = 8,
    recipe: str = "default",
    weight_bits: int = 8,
    act_bits: int = 8,
    seed: int = 0,
    compiled: bool = True,
    rounds: int = 15,
    say: Callable[[str, str], object] = lambda stage, text: print(text),
) -> DemoResult:
    """Quantize a bundled denoiser through torchao and measure what that does.

    Args:
        out: folder for the plan and the recorded calls; a second run goes on with what lies there.
        model: bundled denoiser.
        steps: sampling steps.
        calibration_images: images recorded for calibration.
        images: images compared.
        groups: timestep groups.
        recipe: registered recipe.
        weight_bits: width of weights.
        act_bits: width of activations.
        seed: seed of the calibration images; the compared ones use others.
        compiled: also measure compiled denoisers (most of the demo's time).
        rounds: timed calls of each denoiser.
        say: told which stage begins (see `expected_seconds`), and what it does.
    """
    prompts = PROMPTS.get(model)

    def sampler(count: int, first_seed: int) -> Any:
        conditions = {"prompts": prompts} if prompts else {}
        return adapter("diffusers").sampler(pipe, **conditions, steps=steps, seed=first_seed, images=count, batch=8)

    def recorded(folder: str, sample: Any) -> CalibrationSet:
        return record(denoiser, sample, out / folder, progress=on_terminal())

    say("load", "loading the denoiser")
    pipe, denoiser = load_denoiser(bundled(model))
    say("record", f"sampling {calibration_images} images in full precision for calibration")
    calibration = recorded("calib", sampler(calibration_images, seed))
    say("plan", f"making a plan: recipe {recipe}, W{weight_bits}A{act_bits}, {groups} timestep groups")
    targets = {"weight_bits": weight_bits, "act_bits": act_bits, "options": {"timestep-groups": {"groups": groups}}}
    plan = make_plan(denoiser, calibration, recipe, **targets, seed=seed, progress=on_terminal())
    plan.save(out / "plan")
    say("reference", f"sampling {images} images in full precision, with other seeds")
    compared = sampler(images, seed + 1000)
    held_out = recorded("held-out", compared)
    reference = _images(compared(denoiser))
    say("apply", "applying the plan through torchao, and sampling the same images again")
    quantized = apply(denoiser, plan, "torchao", prefer="fastest", example_inputs=calibration.example_inputs())
    drawn = _images(compared(quantized))
    say("errors", "measuring the error per timestep")
    errors = output_errors(quantized, held_out)
    say("eager", "measuring the time of a call")
    latency = _latency({"fp32": denoiser, "int8": quantized}, held_out, rounds)
    if compiled:
        say("compiled", "compiling both denoisers, and measuring the time of a call again")
        latency |= _compiled_latency({"fp32": denoiser, "int8": quantized}, held_out, rounds)
    say("report", "measuring how far ranges move over time, and writing the report")
    return DemoResult(
        plan=plan,
        images={"fp32": reference, f"W{weight_bits}A{act_bits}": drawn},
        titles=[prompts[i % len(prompts)] if prompts else str(i % 10) for i in range(images)],
        psnr=[_psnr(a, b) for a, b in zip(reference, drawn, strict=True)],
        sqnr={t: error.sqnr for t, error in errors.items()},
        bytes={"fp32": state_bytes(denoiser), "int8": state_bytes(quantized)},
        latency=latency,
        executions=executions(quantized, plan),
        ranges=_ranges(denoiser, calibration, plan),
        drift={t: error.drift_below_signal for t, error in errors.items()},
        blocks=block_figure(partition(denoiser, calibration.example_inputs())),
        facts=_facts(model, denoiser),
    )


def _facts(model: str, denoiser: nn.Module) -> dict[str, str]:
    """What was measured, when, and on what machine."""
    size = sum(p.numel() for p in denoiser.parameters()) / 1e6
    made = datetime.now().strftime("%Y-%m-%d %H:%M")
    return {"model": f"{model}, {size:.1f} M parameters", "made on": made, **machine_facts()}


def _images(batches: list[Any]) -> list[np.ndarray]:
    return [np.squeeze(image) for batch in batches for image in batch.images]


def _psnr(reference: np.ndarray, image: np.ndarray) -> float:
    return psnr(torch.from_numpy(reference)[None], torch.from_numpy(image)[None], value_range=1.0)


def _latency(models: Mapping[str, nn.Module], calls: CalibrationSet, rounds: int) -> dict[str, Latency]:
    return _times({f"{name}, eager": model for name, model in models.items()}, calls, rounds)


def _compiled_latency(models: Mapping[str, nn.Module], calls: CalibrationSet, rounds: int) -> dict[str, Latency]:
    with torch._inductor.config.patch(freezing=True), warnings.catch_warnings(), compiling():
        warnings.filterwarnings("ignore", "To copy construct from a tensor")  # inductor's own
        compiled = {f"{name}, compiled": torch.compile(copy.deepcopy(m)) for name, m in models.items()}
        return _times(compiled, calls, rounds)


def _times(models: Mapping[str, Any], calls: CalibrationSet, rounds: int) -> dict[str, Latency]:
    call = next(calls.calls())
    return compare_latency({n: lambda m=m: call.run(m) for n, m in models.items()}, rounds=rounds)


def _ranges(denoiser: nn.Module, calibration: CalibrationSet, plan: QuantPlan, layers: int = 4) -> Ranges:
    """Timesteps, minima and maxima of the layers whose range moves most."""
    names = [n for n, layer in plan.layers.items() if layer.activation is not None]
    few = calibration.spread(len(calibration), samples=2 * len(calibration))  # of every call: enough for a figure
    found = collect(denoiser, few, names)
    span = {n: found.high(n) - found.low(n) for n in names}
    moving = sorted(names, key=lambda n: float(span[n].min() / span[n].max()))[:layers]
    return {n: (found.timesteps, found.low(n).tolist(), found.high(n).tolist()) for n in moving}
