"""What each pass does to the final images, alone and on top of the others, and what it costs in time.

    python -m benchmarks.ablation --model digits --weight-bits 4 --act-bits 8 --images 32 --seeds 3

Each seed records its own calibration images and is judged on others, from the same noise as full precision. Prints a
table and writes every run as JSON; started again, it goes on where it was stopped. Fake quantization (backend
``simulate``): this measures error, not speed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

import dq_plugins as dq
from benchmarks.records import RESULTS, Records
from benchmarks.tfmq import MODELS, Case, usual_steps
from dq_plugins.recipe import Step
from dq_plugins.report import Table

BALANCE, WEIGHTS, GPTQ = Step("channel-balance"), Step("weight-ranges"), Step("gptq")
UNIFORM = Step("timestep-groups", {"method": "uniform"}), Step("activation-ranges", {"observer": "minmax"})
OPTIMAL = Step("timestep-groups"), Step("activation-ranges", {"observer": "minmax"})
LEAST_ERROR = Step("timestep-groups"), Step("activation-ranges")
CORRECTION = Step("bias-correction")

VARIANTS: dict[str, tuple[Step, ...]] = {
    "nearest, min-max by uniform groups": (WEIGHTS, *UNIFORM),
    "... optimal groups": (WEIGHTS, *OPTIMAL),
    "... optimal groups, ranges of least error": (WEIGHTS, *LEAST_ERROR),
    "balance": (BALANCE, WEIGHTS, *UNIFORM),
    "GPTQ": (WEIGHTS, GPTQ, *UNIFORM),
    "correction": (WEIGHTS, *UNIFORM, CORRECTION),
    "balance, correction": (BALANCE, WEIGHTS, *UNIFORM, CORRECTION),
    "GPTQ, correction": (WEIGHTS, GPTQ, *UNIFORM, CORRECTION),
    "balance, GPTQ": (BALANCE, WEIGHTS, GPTQ, *UNIFORM),
    "balance, GPTQ, correction": (BALANCE, WEIGHTS, GPTQ, *UNIFORM, CORRECTION),
    "... optimal groups instead": (BALANCE, WEIGHTS, GPTQ, *OPTIMAL, CORRECTION),
    "... optimal groups, ranges of least error instead": (BALANCE, WEIGHTS, GPTQ, *LEAST_ERROR, CORRECTION),
}


def measure(case: Case, steps: tuple[Step, ...], seed: int, reference: np.ndarray, bits: dict[str, int]) -> dict:
    """PSNR of every image, drift of the channels' means, and seconds of planning."""
    case.calibration(seed)  # recorded before the clock starts
    start = time.process_time()
    plan = case.plan(steps, seed, **bits)
    seconds = time.process_time() - start
    images = case.images(dq.apply(case.denoiser, plan, backend="simulate"), len(reference))
    error = images.astype(np.float64) - reference
    power = np.square(error).reshape(len(error), -1).mean(1)
    return {
        "psnr": [float(10 * np.log10(1 / max(p, 1e-12))) for p in power],
        "drift": float(np.abs(error.mean(tuple(range(error.ndim - 1)))).max()),
        "cpu_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", choices=MODELS)
    parser.add_argument("--weight-bits", type=int, default=8)
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, help="of sampling")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.steps = args.steps or usual_steps(args.model)
    bits = {"weight_bits": args.weight_bits, "act_bits": args.act_bits}
    settings = {"model": args.model, "images": args.images, "steps": args.steps, **bits}
    records = Records(f"ablation-{args.model}-w{args.weight_bits}a{args.act_bits}", settings, args.out)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        case = Case(args.model, args.steps, Path(folder))
        reference = case.images(case.denoiser, args.images)
        for label in args.variants or VARIANTS:
            runs = [
                records.get(f"{label}, {seed}", partial(measure, case, VARIANTS[label], seed, reference, bits))
                for seed in range(args.seeds)
            ]
            every = [value for run in runs for value in run["psnr"]]
            drift, seconds = (statistics.fmean(run[key] for run in runs) for key in ("drift", "cpu_seconds"))
            rows.append([label, statistics.median(every), min(every), drift, seconds])
            print(*rows[-1], flush=True)
    title = f"{args.model}, W{args.weight_bits}A{args.act_bits}, {args.images} images x {args.seeds} seeds"
    print(Table([title, "PSNR, median", "worst", "drift", "CPU s to plan"], rows))


if __name__ == "__main__":
    main()
