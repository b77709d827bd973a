"""Coefficients of the sampler fitted to a quantized denoiser, at few steps, by the error of final images.

    python -m benchmarks.sampler_correction --model digits --steps 4 6 10 --weight-bits 4

Each plan is sampled from with the pipeline's own scheduler and with the corrected one, without and with the pass
``bias-correction`` before. Each seed records its own calibration images and is judged on others, from the same noise as
full precision with as many steps. Fake quantization (backend ``simulate``).
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
from dq_diffusers import correct_sampler

import dq_plugins as dq
from benchmarks.derived import derive
from benchmarks.records import RESULTS, Records
from benchmarks.tfmq import Case, image_psnr
from dq_plugins.bundled_denoisers import NAMES
from dq_plugins.passes.correction.sampler_correction import CorrectionFindings
from dq_plugins.recipe import Step
from dq_plugins.report import Table

RANGES = (Step("weight-ranges", {"embedding_bits": 8}), Step("timestep-groups", {"method": "uniform"}),
          Step("activation-ranges", {"observer": "by-width"}))  # fmt: skip
PLANS = {"": RANGES, "bias correction, ": (*RANGES, Step("bias-correction"))}


def both(case: Case, steps: tuple[Step, ...], seed: int, bits: dict[str, int], reference: np.ndarray) -> list[Any]:
    """PSNR of every image with the scheduler as it is and corrected."""
    plan = case.plan((*steps, Step("sampler-correction")), seed, **bits)
    found = plan.sections["sampler-correction"].read(CorrectionFindings, "sampler-correction")
    quantized, own = dq.apply(case.denoiser, plan, backend="simulate"), case.pipe.scheduler
    runs = [{"psnr": image_psnr(case.images(quantized, len(reference)), reference)}]
    case.pipe.scheduler = copy.deepcopy(own)
    try:
        correct_sampler(case.pipe, plan)
        images = case.images(quantized, len(reference))
    finally:
        case.pipe.scheduler = own
    said = {"strength": found.strength, "gain": list(found.gain), "rest": list(found.rest)}
    return [*runs, {"psnr": image_psnr(images, reference), **said}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", choices=NAMES)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 6, 10])
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("sampler-correction-work"), help="folder for recordings")
    args = parser.parse_args()
    bits = {"weight_bits": args.weight_bits, "act_bits": args.act_bits}
    settings = {"model": args.model, "images": args.images, **bits}
    name = f"sampler_correction-{args.model}-w{args.weight_bits}a{args.act_bits}"
    records = Records(name, settings, args.out)
    for count in args.steps:
        case = Case(args.model, count, args.work / f"{args.model}-{count}")
        reference = case.images(case.denoiser, args.images)
        for seed in range(args.seeds):
            for prefix, steps in PLANS.items():
                labels = [f"{prefix}{kind}, {count} steps, {seed}" for kind in ("own scheduler", "corrected")]
                if all(label in records.data for label in labels):
                    continue
                for label, run in zip(labels, both(case, steps, seed, bits, reference), strict=True):
                    records.put(label, run)
                    print(label, np.median(run["psnr"]), run.get("strength"), flush=True)
    rows = [[label, *row.values()] for label, row in derive(records.path.stem, records.data).items()]
    print(Table(["", "PSNR, median", "worst", "error power", "median of seeds"], rows))


if __name__ == "__main__":
    main()
