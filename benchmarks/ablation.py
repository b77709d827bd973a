"""What each pass and each recipe does to the final images, and what it costs in time.

    python -m benchmarks.ablation --model digits --weight-bits 4 --act-bits 8 --images 32 --seeds 3
    python -m benchmarks.ablation --model digits --weight-bits 4 --act-bits 4 --variants nothing "gptq alone" all best

A variant is the name of a recipe, or one of those listed here: a part of `best` alone, or all but one of them. Each
seed records its own calibration images and is judged on others, from the same noise as full precision. Prints a table
and writes every run as JSON; started again, it goes on where it was stopped. Fake quantization (backend ``simulate``):
this measures error, not speed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import dq_plugins as dq
from benchmarks.derived import derive
from benchmarks.records import RESULTS, Records
from benchmarks.tfmq import MODELS, Case, image_psnr, usual_steps
from dq_plugins.recipe import Step
from dq_plugins.report import Table

PASSES = (
    "channel-balance",
    "low-rank",
    "gptq",
    "exempt-layers",
    "block-reconstruction",
    "group-widths",
    "bias-correction",
    "learned-ranges",
)
PARTS = (*PASSES, "embeddings at 8 bits", "timestep groups", "dynamic ranges")
"""What makes `best`: passes, and choices of passes that every plan has."""
STATIC = Step("activation-ranges", {"observer": "by-width"})


def of_parts(parts: Collection[str]) -> tuple[Step, ...]:
    """The steps of `best` with some of its parts; without any, one static range for an input, and nearest rounding."""
    options: dict[str, dict[str, Any]] = {
        "weight-ranges": {
            **({"embedding_bits": 8} if "embeddings at 8 bits" in parts else {}),
            **({"method": "later"} if "gptq" in parts else {}),
        },
        "timestep-groups": {} if "timestep groups" in parts else {"groups": 1},
        "activation-ranges": {"observer": "by-width", **({"ranges": "measured"} if "dynamic ranges" in parts else {})},
    }
    steps = (s for s in dq.get("recipe", "best").steps if s.name not in PASSES or s.name in parts)
    return tuple(Step(s.name, options.get(s.name, s.options)) for s in steps)


VARIANTS: dict[str, tuple[Step, ...]] = {
    "nothing": of_parts(()),
    **{f"{part} alone": of_parts({part}) for part in PARTS},
    **{f"all but {part}": of_parts(set(PARTS) - {part}) for part in PARTS},
    "all": of_parts(PARTS),
    "default, static ranges": tuple(STATIC if s.name == STATIC.name else s for s in dq.get("recipe", "default").steps),
}
COLUMNS = ("median", "worst", "power", "drift", "cpu_seconds", "over_recording")


def steps_of(variant: str) -> tuple[Step, ...]:
    """Passes of a variant of this file, or of a registered recipe."""
    return VARIANTS[variant] if variant in VARIANTS else dq.get("recipe", variant).steps


def targets_of(variant: str) -> dict[str, Any]:
    """What a variant aims at beside the widths: parts of `best` at what it does."""
    return dict(dq.get("recipe", "best" if variant in VARIANTS else variant).targets)


def recording(case: Case, seed: int) -> float:
    """CPU seconds of recording what every plan is made from, anew."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        dq.record(case.denoiser, case.sampler(8, 100 * seed, batch=4), folder, progress=False)
        return time.process_time() - start


def measure(case: Case, variant: str, seed: int, reference: np.ndarray, bits: dict[str, int]) -> dict:
    """PSNR of every image, drift of the channels' means, and seconds of planning."""
    case.calibration(seed)  # recorded before the clock starts
    start = time.process_time()
    plan = case.plan(steps_of(variant), seed, **bits, **targets_of(variant))
    seconds = time.process_time() - start
    images = case.images(dq.apply(case.denoiser, plan, backend="simulate"), len(reference))
    error = images.astype(np.float64) - reference
    return {
        "psnr": image_psnr(images, reference),
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
    parser.add_argument("--work", type=Path, default=Path("ablation-work"), help="folder for recordings")
    args = parser.parse_args()
    args.steps = args.steps or usual_steps(args.model)
    bits = {"weight_bits": args.weight_bits, "act_bits": args.act_bits}
    settings = {"model": args.model, "images": args.images, "steps": args.steps, **bits}
    records = Records(f"ablation-{args.model}-w{args.weight_bits}a{args.act_bits}", settings, args.out)
    case, rows = Case(args.model, args.steps, args.work / f"{args.model}-{args.steps}"), []
    reference = case.images(case.denoiser, args.images)
    for seed in range(args.seeds):
        records.get(f"recording, {seed}", partial(recording, case, seed))
    for label in args.variants or VARIANTS:
        for seed in range(args.seeds):
            records.get(f"{label}, {seed}", partial(measure, case, label, seed, reference, bits))
        found = derive(records.path.stem, records.data)[label]
        rows.append([label, *(found[column] for column in COLUMNS)])
        print(*rows[-1], flush=True)
    title = f"{args.model}, W{args.weight_bits}A{args.act_bits}, {args.images} images x {args.seeds} seeds"
    print(Table([title, "PSNR, median", "worst", "error power", "drift", "CPU s to plan", "/ recording"], rows))


if __name__ == "__main__":
    main()
