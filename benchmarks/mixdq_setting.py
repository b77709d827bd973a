"""What the MixDQ benchmarks share: a recorded bundled denoiser, and its candidate quantizers."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dq_diffusers.recording import denoiser_of, load_pipeline, sampler
from torch import nn

import dq_plugins as dq
from dq_plugins.bundled_denoisers import NAMES, bundled
from dq_plugins.passes.allocation.problem import AllocationProblem, Budgets, LayerCost
from dq_plugins.passes.width_candidates import candidates_of
from dq_plugins.quantized.candidates import Candidates, Entry
from dq_plugins.quantized.width import WidthChoices
from dq_plugins.recipe import PassContext, Recipe, Step
from dq_plugins.sensitivity.exact_noise import output_noise
from dq_plugins.sensitivity.trajectory import Trajectory, trajectories_of

WEIGHT_CHOICES, ACT_CHOICES = (2, 3, 4, 5, 6, 8), (4, 6, 8)
RANGES = Recipe("ranges", "", (Step("weight-ranges"), Step("timestep-groups"), Step("activation-ranges")))
SAMPLE = 8, 4
"""Images recorded, and in one batch."""


@dataclass(frozen=True)
class Setting:
    """A recorded denoiser.

    Attributes:
        denoiser: full precision.
        calibration: what is measured on.
        held_out: other seeds, for true errors.
        plan: with ranges at 8 bits.
        context: the run they were made in.
        candidates: every quantizer among the choices.
    """

    denoiser: nn.Module
    calibration: dq.CalibrationSet
    held_out: dq.CalibrationSet
    plan: dq.QuantPlan
    context: PassContext
    candidates: Candidates

    def trajectories(self, held_out: bool = False) -> list[Trajectory]:
        """Recorded sampling runs."""
        chosen = self.held_out if held_out else self.calibration
        return trajectories_of(chosen, self.context.partition.sample_argument)

    def problem(self, noise: dict[Entry, float], **changes: Any) -> AllocationProblem:
        """Weights and inputs of all layers, on the full choices."""
        layers = {}
        for name in self.candidates.layers:
            info = self.context.partition.layers[name]
            inputs = torch.Size(info.input_shape).numel() if name in self.candidates.activations else 0
            layers[name] = LayerCost(torch.Size(info.weight_shape).numel(), inputs, info.macs, info.block)
        choices = WidthChoices(WEIGHT_CHOICES, ACT_CHOICES)
        return AllocationProblem(layers, noise, **{"budgets": Budgets(), "default_choices": choices, **changes})

    def true_noise(self, entries: list[Entry]) -> float:
        """Noise power of the output relative to its signal with some entries quantized together, on held-out calls."""
        noise, signal = output_noise(self.denoiser, self.candidates, entries, self.held_out)
        return noise / signal


def prepare(name: str, folder: Path, steps: int = 20) -> Setting:
    """Record a bundled denoiser twice, and make its candidates.

    Args:
        name: ``"emoji"`` or ``"digits"``.
        folder: for the recordings.
        steps: denoising steps.
    """
    pipe = load_pipeline(bundled(name))
    _, denoiser = denoiser_of(pipe)
    denoiser.eval().requires_grad_(False)
    prompts = (bundled(name) / "prompts.txt").read_text().split("\n") if name == "emoji" else None
    images, batch = SAMPLE

    def recorded(seed: int) -> dq.CalibrationSet:
        chosen = [p for p in prompts if p][seed : seed + images] if prompts else None
        run = sampler(pipe, prompts=chosen, steps=steps, seed=seed, images=images, batch=batch)
        return dq.record(denoiser, run, out=folder / f"{name}-{seed}", progress=False)

    calibration, held_out = recorded(0), recorded(images)
    plan = dq.make_plan(denoiser, calibration, RANGES, progress=False)
    context = PassContext(denoiser, calibration)
    return Setting(
        denoiser, calibration, held_out, plan, context, candidates_of(plan, context, WEIGHT_CHOICES, ACT_CHOICES)
    )


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all MixDQ benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMES, default="digits")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser
