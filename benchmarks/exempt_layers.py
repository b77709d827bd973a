"""What the first and the last layer in full precision buy, on top of a recipe.

    python -m benchmarks.exempt_layers [--model digits | emoji | terrain] [--weight-bits 8] [--seeds 2] [--images 16]

For each seed a plan of the recipe, and the same plan after the pass ``exempt-layers`` has tried both layers on the
recorded runs. Images are others than those recorded; fake-quantized.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dq_plugins as dq
from benchmarks.records import Records
from benchmarks.tfmq import MODELS, Case
from dq_plugins.passes.allocation.exempt_layers import ExemptionFindings, ExemptLayers
from dq_plugins.progress import finish
from dq_plugins.recipe import PassContext


def quality(case: Case, plan: dq.QuantPlan, images: int, reference: np.ndarray) -> dict[str, float]:
    """PSNR of sampled images against full precision, and their mean square error."""
    found = case.images(dq.apply(case.denoiser, plan, "simulate"), images)
    error = np.square(found - reference).reshape(images, -1).mean(1)
    psnr = -10 * np.log10(error)
    return {"PSNR, median": float(np.median(psnr)), "PSNR, worst": float(psnr.min()), "MSE": float(error.mean())}


def one_seed(case: Case, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The plan of the recipe, with and without its exemptions."""
    calibration = case.calibration(seed)
    bits = {"weight_bits": args.weight_bits, "act_bits": args.act_bits}
    recipe = dq.get("recipe", args.recipe)
    recipe = replace(recipe, steps=tuple(step for step in recipe.steps if step.name != ExemptLayers.name))
    plan = dq.make_plan(case.denoiser, calibration, recipe, seed=seed, progress=False, **bits)
    exempt = copy.deepcopy(plan)
    finish(ExemptLayers().run(exempt, PassContext(case.denoiser, calibration)))
    found = exempt.sections["exempt-layers"].read(ExemptionFindings, "exempt-layers")
    reference = case.images(case.denoiser, args.images)
    return {
        "tried": {each.layer: each.why + (": exempt" if each.exempt else ": quantized") for each in found.tried},
        "quantized": quality(case, plan, args.images, reference),
        "exempt": quality(case, exempt, args.images, reference),
    }


def main() -> None:
    """Every seed in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="digits")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--weight-bits", type=int, default=8)
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {key: value for key, value in vars(args).items() if key != "seeds"}
    records = Records(f"exempt_layers-{args.model}-w{args.weight_bits}a{args.act_bits}", settings)
    with tempfile.TemporaryDirectory() as folder:
        case = Case(args.model, args.steps, Path(folder))
        for seed in range(args.seeds):
            print(json.dumps(records.get(f"seed {seed}", partial(one_seed, case, args, seed)), indent=1), flush=True)


if __name__ == "__main__":
    main()
