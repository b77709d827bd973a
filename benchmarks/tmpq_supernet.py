"""Super-network against calibration from scratch: does one set of shared quantizers rank assignments as own ones do?

    python -m benchmarks.tmpq --part supernet [--model digits] [--images 2]

Twenty random assignments of widths are scored by the error of the denoiser's output over recorded calls, once with the
quantizers of one super-network (widths drawn at random while it learned), once with quantizers learned for that
assignment alone. The third score is that of the ranges as they are, nothing learned.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.tmpq_setup import RANGES, record
from dq_plugins import CalibrationSet, make_plan
from dq_plugins.passes.steps.supernet import CalibrationOptions, calibrate
from dq_plugins.passes.width_candidates import candidates_of
from dq_plugins.progress import finish
from dq_plugins.quantized.candidates import Candidates
from dq_plugins.quantized.network import SuperNetwork
from dq_plugins.quantized.width import Width
from dq_plugins.recipe import PassContext, Recipe

WEIGHTS, INPUTS, ASSIGNMENTS = (3, 4, 6), (4, 8), 20
STEPS, SHARED, ALONE, CALLS = 8, 60, 20, 4


def error(
    denoiser: torch.nn.Module, candidates: Candidates, calibration: CalibrationSet, widths: Mapping[str, Width]
) -> float:
    """Mean squared error of the output over recorded calls, relative to its power."""
    noise = signal = 0.0
    with SuperNetwork(denoiser, candidates, calibration.timestep_argument) as network, torch.no_grad():
        network.switch(widths)
        for call in calibration.calls():
            noise += float((call.run(denoiser) - call.output).square().sum())
            signal += float(call.output.square().sum())
    return noise / signal


def supernet(args: argparse.Namespace, folder: Path, report: dict[str, Any]) -> None:
    """Rank correlations of the three scores."""
    _, denoiser, calibration = record(args, folder, 0, STEPS)
    plan = make_plan(denoiser, calibration, Recipe("ranges", "", RANGES), progress=False)
    context = PassContext(denoiser, calibration)
    start = candidates_of(plan, context, WEIGHTS, INPUTS)
    rng = np.random.default_rng(args.seed)
    assignments = [
        {
            name: Width(int(rng.choice(WEIGHTS)), int(rng.choice(INPUTS)) if name in start.activations else None)
            for name in start.layers
        }
        for _ in range(ASSIGNMENTS)
    ]

    def learned(**changes: Any) -> Candidates:
        options = CalibrationOptions(**{"calls": CALLS, **changes})
        return finish(calibrate(denoiser, start, calibration, context.partition, options))

    began = time.process_time()
    shared = learned(iterations=SHARED)
    print(f"super-network learned in {time.process_time() - began:.0f} CPU s", flush=True)
    scores: dict[str, list[float]] = {"super-network": [], "from scratch": [], "nothing learned": []}
    for widths in assignments:
        own = learned(iterations=ALONE, draw=widths)
        for name, candidates in zip(scores, (shared, own, start), strict=True):
            scores[name].append(error(denoiser, candidates, calibration, widths))
        print(f"  {len(scores['from scratch'])}/{ASSIGNMENTS}, {time.process_time() - began:.0f} CPU s", flush=True)
    pairs = {
        name: spearmanr(scores[name], scores["from scratch"]).statistic for name in ("super-network", "nothing learned")
    }
    report["supernet"] = {"scores": scores, "rank correlation with from scratch": pairs}
    print(f"{args.model}: rank correlation with calibration from scratch over {ASSIGNMENTS} assignments")
    for name, value in pairs.items():
        print(f"  {name}: {value:.3f}")
    medians = {name: float(np.median(values)) for name, values in scores.items()}
    print("median relative error: " + ", ".join(f"{name} {value:.4g}" for name, value in medians.items()))
