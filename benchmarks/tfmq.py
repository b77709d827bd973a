"""TFMQ-DM on the bundled denoisers: temporal feature error at W4, images at W4A8 beside stock Brevitas and torchao.

    python -m benchmarks.tfmq --model digits --images 64 --seeds 3

Prints two tables and writes every run as JSON; started again, it goes on where it was stopped. Each seed records its
own calibration images. Fake quantization (backend ``simulate``): this measures error, not speed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import dq_plugins as dq
from benchmarks import terrain
from benchmarks.records import RESULTS, Records
from dq_plugins.bundled_denoisers import NAMES, bundled
from dq_plugins.demo import PROMPTS
from dq_plugins.passes.temporal.block import temporal_block
from dq_plugins.passes.temporal.features import FeatureError, feature_error
from dq_plugins.recipe import Recipe, Step
from dq_plugins.report import Table

MODELS = (*NAMES, "terrain")
WEIGHTS, TABLES = Step("weight-ranges"), Step("weight-ranges", {"embedding_bits": 8})
RANGES = (
    Step("timestep-groups", {"groups": 1, "method": "uniform"}),
    Step("activation-ranges", {"observer": "minmax"}),
)
GROUPED = (Step("timestep-groups"), Step("activation-ranges"))


def image_recipes(recon: dict[str, Any], *, embeddings: bool = True) -> dict[str, tuple[Step, ...]]:
    """What is compared at W4A8; ``recon`` holds the options of block reconstruction.

    Args:
        recon: options.
        embeddings: whether the denoiser has embedding tables, which Brevitas and torchao leave alone.
    """
    blocks, together = Step("block-reconstruction", recon), {**recon, "freeze_temporal": False}
    temporal, finite = Step("temporal-reconstruction"), Step("finite-set-ranges")
    minmax = {"method": "minmax"}
    recipes = {
        "min-max, nearest": (Step("weight-ranges", minmax), *RANGES),
        "default": (WEIGHTS, *GROUPED),
        "reconstruction, temporal layers in their blocks": (WEIGHTS, *GROUPED, Step("block-reconstruction", together)),
        "tfmq": (WEIGHTS, *GROUPED, temporal, finite, blocks),
        "tfmq, t and conditions": (
            WEIGHTS,
            *GROUPED,
            Step("temporal-reconstruction", {"conditions": 32}),
            Step("finite-set-ranges", {"conditions": 32}),
            blocks,
        ),
    }
    spared = {
        "min-max, nearest": (Step("weight-ranges", minmax | {"embedding_bits": 8}), *RANGES),
        "reconstruction, temporal layers in their blocks": (TABLES, *GROUPED, Step("block-reconstruction", together)),
        "tfmq": (TABLES, *GROUPED, temporal, finite, blocks),
    }
    return recipes | ({f"{k}; embeddings at 8 bits": v for k, v in spared.items()} if embeddings else {})


def feature_recipes(recon: dict[str, Any]) -> dict[str, tuple[Step, ...]]:
    """What is compared at the boundary of the temporal block, at W4."""
    return {
        "nearest": (WEIGHTS,),
        "reconstruction through the blocks": (
            WEIGHTS,
            Step("block-reconstruction", {**recon, "freeze_temporal": False}),
        ),
        "temporal reconstruction (TIAR)": (WEIGHTS, Step("temporal-reconstruction")),
    }


def usual_steps(name: str) -> int:
    """Steps of sampling that this denoiser is measured with."""
    return terrain.STEPS if name == "terrain" else 20


def image_psnr(images: np.ndarray, reference: np.ndarray) -> list[float]:
    """PSNR in dB of every image in [0, 1]; 120 at most."""
    power = np.square(images.astype(np.float64) - reference).reshape(len(reference), -1).mean(1)
    return [float(10 * np.log10(1 / max(p, 1e-12))) for p in power]


class Case:
    """A denoiser, bundled or `benchmarks.terrain`'s, recorded once for each seed."""

    def __init__(self, name: str, steps: int, folder: Path) -> None:
        self.name, self.steps, self.folder = name, steps, folder
        self.denoiser: nn.Module
        if name == "terrain":
            self.denoiser = terrain.terrain_denoiser()
            return
        self.adapter = dq.get("adapter", "diffusers")()
        self.pipe = self.adapter.load_pipeline(bundled(name))
        self.denoiser = self.adapter.denoiser_of(self.pipe)[1].eval().requires_grad_(False)

    def sampler(self, images: int, seed: int, batch: int = 8) -> Any:
        if self.name == "terrain":
            return terrain.TerrainSampler(images, seed, min(batch, 4), self.steps)
        conditions = {"prompts": PROMPTS[self.name]} if self.name in PROMPTS else {}
        return self.adapter.sampler(self.pipe, **conditions, steps=self.steps, seed=seed, images=images, batch=batch)

    def calibration(self, seed: int) -> dq.CalibrationSet:
        """8 recorded images; another seed, other noise (and classes)."""
        run = self.sampler(8, 100 * seed, batch=4)
        return dq.record(self.denoiser, run, self.folder / str(seed), progress=False)

    def images(self, denoiser: nn.Module, count: int) -> np.ndarray:
        return np.concatenate([np.asarray(out.images) for out in self.sampler(count, 10_000)(denoiser)])

    def plan(self, steps: tuple[Step, ...], seed: int, **bits: int | None) -> dq.QuantPlan:
        recipe = Recipe("benchmark", "", steps)
        return dq.make_plan(self.denoiser, self.calibration(seed), recipe, seed=seed, progress=False, **bits)  # type: ignore[arg-type]


def simulated(case: Case, steps: tuple[Step, ...], seed: int) -> nn.Module:
    """The denoiser with a plan made by these passes."""
    return dq.apply(case.denoiser, case.plan(steps, seed, weight_bits=4, act_bits=8), backend="simulate")


def feature_errors(case: Case, plan: dq.QuantPlan) -> FeatureError:
    block = temporal_block(case.denoiser, case.calibration(0).example_inputs())
    assert block is not None
    points = block.points(plan.schedule.sorted)
    return feature_error(block.features(points), block.features(points, block.planned_weights(plan)))


def mean_of(runs: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every figure over the seeds, and the spread of the first."""
    first = next(iter(runs[0]))
    spread = max(r[first] for r in runs) - min(r[first] for r in runs)
    return {k: statistics.fmean(r[k] for r in runs) for k in runs[0]} | {"spread": spread}


def image_run(
    case: Case, method: Callable[[int], nn.Module], seed: int, count: int, reference: np.ndarray
) -> dict[str, float]:
    """Error of the images of one quantized denoiser, and the seconds to make it."""
    start = time.process_time()
    quantized = method(seed)
    seconds = time.process_time() - start
    images = case.images(quantized, count)
    return {"image_mse": float(np.mean((images - reference) ** 2)), "cpu_seconds": seconds}


def features(case: Case, records: Records, seeds: int, recon: dict[str, Any]) -> None:
    """Table of feature errors; the plans hold weights alone."""
    rows = []
    for label, steps in feature_recipes(recon).items():

        def run(seed: int, steps: tuple[Step, ...] = steps) -> dict[str, float]:
            error = feature_errors(case, case.plan(steps, seed, weight_bits=4, act_bits=None))
            return {k: getattr(error, k) for k in ("cosine", "mismatch", "relative")}

        found = mean_of([records.get(f"features, {label}, {s}", partial(run, s)) for s in range(seeds)])
        rows.append([label, found["cosine"], found["mismatch"]])
    rows = [[label, cosine, cosine / rows[0][1], mismatch] for label, cosine, mismatch in rows]
    print(Table(["temporal features, W4", "1 - cos", "/ nearest", "mismatch"], rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", choices=MODELS)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of sampling")
    parser.add_argument("--iterations", type=int, default=300, help="of block reconstruction, for each block")
    parser.add_argument("--calls", type=int, default=40, help="recorded calls that block reconstruction sees")
    parser.add_argument("--recipes", nargs="+", help="only these")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.steps = args.steps or usual_steps(args.model)
    from benchmarks.tfmq_stock import stock_methods  # Brevitas and torchao, for those who run this

    settings = {k: v for k, v in vars(args).items() if k not in ("out", "recipes", "seeds")}
    records, recon = Records(f"tfmq-{args.model}", settings, args.out), {"iterations": args.iterations}
    recon["calls"] = args.calls
    with tempfile.TemporaryDirectory() as folder:
        case = Case(args.model, args.steps, Path(folder))
        embeddings = any(isinstance(module, nn.Embedding) for module in case.denoiser.modules())
        recipes = image_recipes(recon, embeddings=embeddings)
        methods: dict[str, Callable[[int], nn.Module]] = {k: partial(simulated, case, v) for k, v in recipes.items()}
        methods |= stock_methods(case, args.iterations, args.calls)
        methods = {label: methods[label] for label in args.recipes or methods}
        reference = case.images(case.denoiser, args.images)
        for seed in range(args.seeds):
            for label, method in methods.items():
                one = records.get(
                    f"images, {label}, {seed}", partial(image_run, case, method, seed, args.images, reference)
                )
                print(f"  {label}, seed {seed}: {one}", flush=True)
        features(case, records, args.seeds, recon)
    found = {label: mean_of([records.data[f"images, {label}, {s}"] for s in range(args.seeds)]) for label in methods}
    plain = next(iter(found.values()))["image_mse"]
    rows = [[k, v["image_mse"], v["spread"], v["image_mse"] / plain, v["cpu_seconds"]] for k, v in found.items()]
    headings = [f"{args.images} images, W4A8", "MSE to fp32", "max - min", "/ min-max", "CPU s to plan"]
    print(Table(headings, rows))


if __name__ == "__main__":
    main()
