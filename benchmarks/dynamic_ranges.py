"""Ranges by timestep group, per token, and per token where that is measured to win: final images.

    python -m benchmarks.dynamic_ranges --model digits --act-bits 4

Weights have 8 bits, outputs are corrected by group (the pass ``bias-correction``), first and last layers have 8 bits.
Each seed records its own calibration images and is judged on others, from the same noise as full precision. Writes
every run as JSON; started again, it goes on where it was stopped. Fake quantization: this measures error, not speed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import dq_plugins as dq
from benchmarks.records import RESULTS, Records
from benchmarks.tfmq import MODELS, Case, image_psnr, usual_steps
from dq_plugins.recipe import Step
from dq_plugins.report import Table

VARIANTS: dict[str, dict[str, Any]] = {
    "by group": {},
    "per token": {"ranges": "dynamic"},
    **{f"measured, {gain} dB": {"ranges": "measured", "dynamic_gain": gain} for gain in (0, 1, 3)},
}


def measure(case: Case, options: dict[str, Any], bits: int, seed: int, reference: np.ndarray) -> dict[str, Any]:
    """PSNR of every image, layers with ranges per token, and what these won."""
    ranges = Step("activation-ranges", {"observer": "by-width", **options})
    steps = (Step("weight-ranges"), Step("timestep-groups"), ranges, Step("bias-correction", {"calls": 20}))
    plan = case.plan(steps, seed, weight_bits=8, act_bits=bits)
    images = case.images(dq.apply(case.denoiser, plan, backend="simulate"), len(reference))
    found = plan.sections.get("activation-ranges")
    return {
        "psnr": image_psnr(images, reference),
        "dynamic": [name for name, layer in plan.layers.items() if layer.dynamic],
        "linear": sum(layer.kind == "linear" and layer.activation is not None for layer in plan.layers.values()),
        "gains": {} if found is None else found.data["dynamic_gain"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", choices=MODELS)
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="only these")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    settings = {"model": args.model, "images": args.images, "act_bits": args.act_bits}
    records = Records(f"dynamic-ranges-{args.model}-a{args.act_bits}", settings, args.out)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        case = Case(args.model, usual_steps(args.model), Path(folder))
        reference = case.images(case.denoiser, args.images)
        for label in args.variants:
            runs = [
                records.get(f"{label}, {seed}", partial(measure, case, VARIANTS[label], args.act_bits, seed, reference))
                for seed in range(args.seeds)
            ]
            every = [value for run in runs for value in run["psnr"]]
            layers = " ".join(f"{len(run['dynamic'])}/{run['linear']}" for run in runs)
            rows.append([label, statistics.median(every), min(every), layers])
            print(*rows[-1], flush=True)
    title = f"{args.model}, W8A{args.act_bits}, {args.images} images x {args.seeds} seeds"
    print(Table([title, "PSNR, median", "worst", "layers per token"], rows))


if __name__ == "__main__":
    main()
