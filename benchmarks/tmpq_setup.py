"""A bundled denoiser recorded and measured, ready to be searched for timesteps and widths."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dq_diffusers.recording import denoiser_of, load_pipeline, sampler

import dq_plugins as dq
from dq_plugins.bundled_denoisers import bundled
from dq_plugins.passes.steps.fitness import SamplingFitness
from dq_plugins.passes.steps.joint import JointSearch
from dq_plugins.passes.steps.runs import runs_of
from dq_plugins.passes.steps.timestep_reduction import Setting, TimestepReduction
from dq_plugins.passes.width_candidates import candidates_of
from dq_plugins.plan import Targets
from dq_plugins.progress import finish
from dq_plugins.quantized.width import Width
from dq_plugins.recipe import PassContext, Recipe, Step

CHOICES = {"weight_choices": (3, 4, 5, 6, 8), "act_choices": (4, 6, 8)}
TARGET, STEPS, COUNTS = Width(4, 6), 10, (10, 8, 13)
SPACINGS = ("trailing", "leading", "linspace")
RANGES = (Step("weight-ranges"), Step("timestep-groups"), Step("activation-ranges"))
OTHERS = 1000
"""Seeds of other images are this far from those of the search."""


class Errors(NamedTuple):
    """Mean squared errors to full precision over all recorded steps.

    Attributes:
        these: mean over the images of the search.
        others: mean over as many others.
        median: of the others. A sampler that turns one image into another one makes a mean of its own.
    """

    these: float
    others: float
    median: float


NOTHING = Errors(*[float("nan")] * 3)


def record(
    args: argparse.Namespace, folder: Path, seed: int, steps: int = 100
) -> tuple[Any, torch.nn.Module, dq.CalibrationSet]:
    """A recording of full-precision sampling."""
    pipe = load_pipeline(bundled(args.model))
    _, denoiser = denoiser_of(pipe)
    denoiser.eval().requires_grad_(False)
    if not args.clip:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=False)
    prompts = None
    if args.model == "emoji":
        lines = [p for p in (bundled("emoji") / "prompts.txt").read_text().split("\n") if p]
        prompts = [lines[(seed * args.images + i) % len(lines)] for i in range(args.images)]
    run = sampler(pipe, prompts=prompts, steps=steps, images=args.images, batch=args.images, seed=seed)
    return pipe, denoiser, dq.record(denoiser, run, out=folder / f"calibration-{seed}-{steps}", progress=False)


def sensitivity(args: argparse.Namespace, denoiser: torch.nn.Module, calibration: dq.CalibrationSet) -> dq.QuantPlan:
    """A plan with ranges and sensitivities."""
    options = {**CHOICES, "calls_per_timestep": 1, "draws": args.draws, "check_entries": 12}
    recipe = Recipe("measured", "", (*RANGES, Step("sensitivity", options)))
    return dq.make_plan(denoiser, calibration, recipe, progress=False)


def _by_image(fitness: SamplingFitness, final: torch.Tensor) -> torch.Tensor:
    reference = torch.cat([run.final for run in fitness.runs])
    return (final - reference).double().square().flatten(1).mean(1)


class Benchmark:
    """A measured denoiser, and errors of any schedule with any widths."""

    def __init__(self, args: argparse.Namespace, folder: Path, seed: int) -> None:
        self.args, self.seed = args, seed
        self.pipe, self.denoiser, self.calibration = record(args, folder, seed)
        held = record(args, folder, OTHERS + seed)[2]
        short = record(args, folder, seed, steps=20)[2]
        self.plan = sensitivity(args, self.denoiser, short)
        self.context = PassContext(
            self.denoiser, self.calibration, Targets(TARGET.weight or 8, TARGET.activation), seed
        )
        quantizers = candidates_of(self.plan, PassContext(self.denoiser, short), *CHOICES.values())
        self.context.shared(("candidates", *CHOICES.values()), lambda: quantizers)  # what the pass will ask for
        self.said("recorded, ranges and sensitivities measured")
        self.setting: Setting = finish(self._pass().setting(self.plan, self.context))
        self.said("costs of steps measured")
        self.others = runs_of(held, self.context.partition.sample_argument)[1]

    def said(self, what: str) -> None:
        """Say what is done."""
        print(f"{time.process_time():7.0f} CPU s  {what}", flush=True)

    def search(self, *, widths: bool = True, **options: Any) -> JointSearch:
        """A search with other options; without widths everything stays in full precision."""
        alone = replace(self.setting, candidates=replace(self.setting.candidates, weights={}, activations={}))
        return self._pass(**options).search(self.plan, self.context, self.setting if widths else alone)

    def _pass(self, **options: Any) -> TimestepReduction:
        population = self.args.population
        return TimestepReduction(
            **{
                "steps": COUNTS,
                "grid": 50,
                "spacing": self.args.spacing,
                "seconds": self.args.seconds,
                "images": (0.25, 1.0),
                "generations": self.args.generations,
                "population": population,
                "parents": max(population // 5, 1),
                "mutants": population // 2,
                "crossovers": population // 5,
                **options,
            }
        )

    def errors(self, fitness: SamplingFitness, timesteps: Sequence[float], widths: Mapping[str, Width]) -> Errors:
        """Errors of a schedule with some widths."""
        others = replace(fitness, runs=self.others, images=(self.args.images,))
        these, there = (_by_image(f, f.final(tuple(timesteps), dict(widths))) for f in (fitness, others))
        return Errors(float(these.mean()), float(there.mean()), float(there.median()))

    def own(self, count: int) -> dict[str, tuple[float, ...]]:
        """Timesteps of the scheduler's spacings, the ranges of the quantizers permitting."""
        found = {}
        low, high = self.calibration.timestep_range
        for spacing in SPACINGS:
            scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config, timestep_spacing=spacing)
            scheduler.set_timesteps(count)
            timesteps = tuple(float(t) for t in scheduler.timesteps)
            if low <= timesteps[-1] and timesteps[0] <= high:
                found[spacing] = timesteps
        return found
