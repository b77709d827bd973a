"""The main job, end to end on a bundled denoiser: sample, calibrate, plan, quantize, sample again, compare.

Every figure is measured in the run that prints it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dq_plugins.application import apply
from dq_plugins.bundled import bundled
from dq_plugins.calibration import CalibrationSet, record
from dq_plugins.commands.pipelines import diffusers_adapter
from dq_plugins.metrics.latency import Latency, compare_latency
from dq_plugins.metrics.output_error import output_sqnr
from dq_plugins.metrics.size import state_bytes
from dq_plugins.plan import QuantPlan
from dq_plugins.progress import on_terminal
from dq_plugins.quantized.statistics import collect
from dq_plugins.recipe import make_plan
from dq_plugins.report.demo_page import DemoResult
from dq_plugins.report.execution import executions

PROMPTS = {
    "emoji": (
        "fox face",
        "panda face",
        "frog face",
        "sunflower",
        "octopus",
        "parrot",
        "mushroom",
        "turtle",
    ),
}


@dataclass(frozen=True)
class DemoSettings:
    """How much the demo does.

    Attributes:
        name: bundled denoiser.
        steps: sampling steps.
        calibration_images: images recorded for calibration.
        images: images compared.
        groups: timestep groups.
        recipe: recipe.
        weight_bits: width of weights.
        act_bits: width of activations.
        seed: seed of the calibration images; the compared ones use others.
        compile: also measure compiled denoisers (most of the demo's time).
        rounds: timed calls of each denoiser.
    """

    name: str = "emoji"
    steps: int = 20
    calibration_images: int = 16
    images: int = 8
    groups: int = 8
    recipe: str = "default"
    weight_bits: int = 8
    act_bits: int = 8
    seed: int = 0
    compile: bool = True
    rounds: int = 15


class Demo:
    """One run; `steps` yields what it is doing, and `result` is there when it is done."""

    result: DemoResult

    def __init__(self, settings: DemoSettings, out: Path) -> None:
        self.settings, self.out = settings, out
        self.adapter = diffusers_adapter()

    def steps(self) -> Iterator[str]:
        """Run the demo."""
        s = self.settings
        yield "loading the denoiser"
        pipe = self.adapter.load_pipeline(bundled(s.name))
        _, denoiser = self.adapter.denoiser_of(pipe)
        denoiser.eval().requires_grad_(False)
        yield f"sampling {s.calibration_images} images in full precision for calibration"
        calibration = self._record(pipe, denoiser, s.calibration_images, s.seed, "calib")
        yield f"making a plan: recipe {s.recipe}, W{s.weight_bits}A{s.act_bits}, {s.groups} timestep groups"
        plan = self._plan(denoiser, calibration)
        yield f"sampling {s.images} images in full precision, with other seeds"
        held_out = self._record(pipe, denoiser, s.images, s.seed + 1000, "held-out")
        reference = self._images(pipe, denoiser)
        yield "applying the plan through torchao, and sampling the same images again"
        quantized = apply(denoiser, plan, "torchao", example_inputs=calibration.example_inputs())
        images = self._images(pipe, quantized)
        yield "measuring the error per timestep"
        sqnr = output_sqnr(quantized, held_out)
        yield "measuring latency, eager" + (" and compiled" if s.compile else "")
        latency = self._latency(denoiser, quantized, held_out)
        self.result = DemoResult(
            plan=plan,
            images={"fp32": reference, f"W{s.weight_bits}A{s.act_bits}": images},
            titles=self._titles(),
            psnr=[_psnr(a, b) for a, b in zip(reference, images, strict=True)],
            sqnr=sqnr,
            bytes={"fp32": state_bytes(denoiser), "int8": state_bytes(quantized)},
            latency=latency,
            executions=executions(quantized, plan),
            ranges=self._ranges(denoiser, calibration, plan),
        )

    def _sampler(self, pipe: Any, images: int, seed: int) -> Callable[[nn.Module], list[Any]]:
        conditions = {"prompts": PROMPTS[self.settings.name]} if self.settings.name in PROMPTS else {}
        return self.adapter.sampler(pipe, **conditions, steps=self.settings.steps, seed=seed, images=images, batch=8)

    def _record(self, pipe: Any, denoiser: nn.Module, images: int, seed: int, folder: str) -> CalibrationSet:
        sampler = self._sampler(pipe, images, seed)
        options = {"total": sampler.total, "progress": on_terminal()}  # type: ignore[attr-defined]
        return record(denoiser, sampler, self.out / folder, **options)

    def _plan(self, denoiser: nn.Module, calibration: CalibrationSet) -> QuantPlan:
        s = self.settings
        plan = make_plan(
            denoiser,
            calibration,
            s.recipe,
            weight_bits=s.weight_bits,
            act_bits=s.act_bits,
            seed=s.seed,
            options={"timestep-groups": {"groups": s.groups}},
            progress=on_terminal(),
        )
        plan.save(self.out / "plan")
        return plan

    def _images(self, pipe: Any, denoiser: nn.Module) -> list[np.ndarray]:
        batches = self._sampler(pipe, self.settings.images, self.settings.seed + 1000)(denoiser)
        return [np.squeeze(image) for batch in batches for image in batch.images]

    def _titles(self) -> Sequence[str]:
        count = self.settings.images
        prompts = PROMPTS.get(self.settings.name)
        return [prompts[i % len(prompts)] if prompts else str(i % 10) for i in range(count)]

    def _latency(self, full: nn.Module, quantized: nn.Module, calls: CalibrationSet) -> dict[str, Latency]:
        call = next(calls.calls())
        models = {"fp32, eager": full, "int8, eager": quantized}
        functions = {name: lambda m=model: call.run(m) for name, model in models.items()}
        times = compare_latency(functions, rounds=self.settings.rounds)
        if not self.settings.compile:
            return times
        with torch._inductor.config.patch(freezing=True):
            compiled = {
                "fp32, compiled": torch.compile(copy.deepcopy(full)),
                "int8, compiled": torch.compile(copy.deepcopy(quantized)),
            }
            functions = {name: lambda m=model: call.run(m) for name, model in compiled.items()}
            return times | compare_latency(functions, rounds=self.settings.rounds)

    def _ranges(
        self, denoiser: nn.Module, calibration: CalibrationSet, plan: QuantPlan, layers: int = 4
    ) -> dict[str, tuple[Sequence[float], list[float], list[float]]]:
        """Timesteps, minima and maxima of the layers whose range moves most."""
        names = [n for n, layer in plan.layers.items() if layer.activation is not None]
        found = collect(denoiser, calibration, names)
        span = {n: found.high(n) - found.low(n) for n in names}
        moving = sorted(names, key=lambda n: float(span[n].min() / span[n].max()))[:layers]
        return {n: (found.timesteps, found.low(n).tolist(), found.high(n).tolist()) for n in moving}


def _psnr(reference: np.ndarray, image: np.ndarray) -> float:
    error = float(np.mean((reference.astype(np.float64) - image) ** 2))
    return 10 * float(np.log10(1 / error)) if error > 0 else float("inf")
