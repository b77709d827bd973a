"""TFMQ-DM on the bundled denoisers: temporal feature error at W4, and images at W4A8, against plain baselines.

    python -m benchmarks.tfmq --model digits --images 64 --seeds 3

Prints two tables and writes them as JSON. Fake quantization (backend ``simulate``): this measures error, not speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import dq_plugins as dq
from dq_plugins.bundled import NAMES, bundled
from dq_plugins.demo import PROMPTS
from dq_plugins.recipe import Recipe, Step
from dq_plugins.report import Table
from dq_plugins.temporal import FeatureError, feature_error, temporal_block

WEIGHTS, RECON = Step("weight-ranges"), {"iterations": 300, "calls": 40}
RANGES = (
    Step("timestep-groups", {"groups": 1, "method": "uniform"}),
    Step("activation-ranges", {"observer": "minmax"}),
)
GROUPED = (Step("timestep-groups"), Step("activation-ranges"))
IMAGE_RECIPES = {
    "min-max, nearest": (Step("weight-ranges", {"method": "minmax"}), *RANGES),
    "default": (WEIGHTS, *GROUPED),
    "reconstruction, temporal layers in their blocks": (
        WEIGHTS,
        Step("block-reconstruction", {**RECON, "freeze_temporal": False}),
        *GROUPED,
    ),
    "tfmq": (
        WEIGHTS,
        Step("temporal-reconstruction"),
        Step("block-reconstruction", RECON),
        *GROUPED,
        Step("finite-set-ranges"),
    ),
}
FEATURE_RECIPES = {
    "nearest": (WEIGHTS,),
    "reconstruction through the blocks": (
        WEIGHTS,
        Step("block-reconstruction", {**RECON, "freeze_temporal": False}),
    ),
    "temporal reconstruction (TIAR)": (WEIGHTS, Step("temporal-reconstruction")),
}


class Case:
    """A bundled denoiser with its calibration set."""

    def __init__(self, name: str, steps: int, folder: Path) -> None:
        adapter = dq.get("adapter", "diffusers")()
        self.name, self.steps, self.adapter = name, steps, adapter
        self.pipe = adapter.load_pipeline(bundled(name))
        self.denoiser: nn.Module = adapter.denoiser_of(self.pipe)[1].eval().requires_grad_(False)
        self.calibration = dq.record(self.denoiser, self.sampler(16, 0), folder, progress=False)

    def sampler(self, images: int, seed: int) -> Any:
        conditions = {"prompts": PROMPTS[self.name]} if self.name in PROMPTS else {}
        return self.adapter.sampler(self.pipe, **conditions, steps=self.steps, seed=seed, images=images, batch=8)

    def images(self, denoiser: nn.Module, count: int) -> np.ndarray:
        return np.concatenate([np.asarray(out.images) for out in self.sampler(count, 10_000)(denoiser)])

    def plan(self, steps: tuple[Step, ...], seed: int, **bits: int | None) -> dq.QuantPlan:
        recipe = Recipe("benchmark", "", steps)
        return dq.make_plan(self.denoiser, self.calibration, recipe, seed=seed, progress=False, **bits)  # type: ignore[arg-type]


def feature_errors(case: Case, plan: dq.QuantPlan) -> FeatureError:
    block = temporal_block(case.denoiser, case.calibration.example_inputs())
    assert block is not None
    weights = block.weights()
    planned = {
        f"{n}.weight": plan.layers[n].weight.fake(weights[f"{n}.weight"])  # type: ignore[union-attr]
        for n in set(block.layers.values())
    }
    timesteps = plan.schedule.sorted
    return feature_error(block.features(timesteps), block.features(timesteps, planned))


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def features(case: Case, seeds: int) -> dict[str, dict[str, float]]:
    found = {}
    for label, steps in FEATURE_RECIPES.items():
        errors = [feature_errors(case, case.plan(steps, s, weight_bits=4, act_bits=None)) for s in range(seeds)]
        found[label] = {k: mean([getattr(e, k) for e in errors]) for k in ("cosine", "mismatch", "relative")}
    return found


def image_errors(case: Case, seeds: int, count: int) -> dict[str, dict[str, float]]:
    reference = case.images(case.denoiser, count)
    found = {}
    for label, steps in IMAGE_RECIPES.items():
        errors, seconds = [], []
        for seed in range(seeds):
            start = time.perf_counter()
            plan = case.plan(steps, seed, weight_bits=4, act_bits=8)
            seconds.append(time.perf_counter() - start)
            images = case.images(dq.apply(case.denoiser, plan, backend="simulate"), count)
            errors.append(float(np.mean((images - reference) ** 2)))
        found[label] = {"image_mse": mean(errors), "spread": max(errors) - min(errors), "seconds": mean(seconds)}
        print(f"  {label}: {found[label]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", choices=NAMES)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        case = Case(args.model, args.steps, Path(folder))
        found = {"features": features(case, args.seeds), "images": image_errors(case, args.seeds, args.images)}
    nearest = found["features"]["nearest"]["cosine"]
    rows = [[k, v["cosine"], v["cosine"] / nearest, v["mismatch"]] for k, v in found["features"].items()]
    print(Table(["temporal features, W4", "1 - cos", "/ nearest", "mismatch"], rows))
    plain = found["images"]["min-max, nearest"]["image_mse"]
    rows = [[k, v["image_mse"], v["image_mse"] / plain, v["seconds"]] for k, v in found["images"].items()]
    print(Table([f"{args.images} images, W4A8", "MSE to fp32", "/ min-max", "seconds to plan"], rows))
    args.out.mkdir(exist_ok=True)
    described = {"settings": {k: str(v) for k, v in vars(args).items() if k != "out"}, "torch": torch.__version__}
    (args.out / f"tfmq-{args.model}.json").write_text(json.dumps(described | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
