"""Do timestep groups still pay after rotation? Every combination of four ingredients, judged by final images.

    python -m benchmarks.transforms --model digits --weight-bits 4 --act-bits 4 --images 16 --seeds 3
    python -m benchmarks.transforms --model digits --ingredients groups rotation principal

Ingredients: ranges by timestep group (or one range for all timesteps), rotation, low-rank branch of the weight, channel
balance; on request principal directions of the inputs in floating point (in a record of their own). What they stand on
is the same everywhere: weight scales in groups of inputs, GPTQ, and bias correction by the groups of the ranges. Each
seed records its own calibration images and is judged on others, from the same noise as full precision.

Prints what each combination leaves, and what each ingredient multiplies the error power of an image by: geometric mean
over images, seeds and the combinations of the others, with a 95 % bootstrap interval over images. Writes every run as
JSON; started again, it goes on where it was stopped. Fake quantization (backend ``simulate``).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Collection
from functools import partial
from pathlib import Path

import numpy as np

import dq_plugins as dq
from benchmarks.derived import derive
from benchmarks.records import RESULTS, Records
from benchmarks.tfmq import MODELS, Case, image_psnr, usual_steps
from dq_plugins.recipe import Step
from dq_plugins.report import Table

INGREDIENTS = ("groups", "rotation", "low rank", "balance", "principal")
"""In the order of their names in the records."""


def label_of(chosen: tuple[bool, ...]) -> str:
    """Name of a combination."""
    return " + ".join(name for name, used in zip(INGREDIENTS, chosen, strict=True) if used) or "none"


def steps_of(chosen: tuple[bool, ...], rank: int) -> tuple[Step, ...]:
    """Passes of a combination."""
    groups, rotation, low_rank, balance, principal = chosen
    branches = ("weight", "weighted-error") * low_rank + ("principal",) * principal
    return (
        *([Step("channel-balance")] if balance else []),
        *([Step("rotation")] if rotation else []),
        *([Step("low-rank", {"ranks": (rank,), "methods": branches})] if branches else []),
        Step("weight-ranges", {"embedding_bits": 8}),
        Step("gptq"),
        Step("timestep-groups", {} if groups else {"groups": 1}),
        Step("activation-ranges", {"observer": "by-width"}),
        Step("bias-correction"),
    )


def _combinations(ingredients: Collection[str]) -> list[tuple[bool, ...]]:
    """All combinations of some ingredients."""
    return list(itertools.product(*((False, True) if name in ingredients else (False,) for name in INGREDIENTS)))


def measure(case: Case, steps: tuple[Step, ...], seed: int, reference: np.ndarray, options: dict[str, int]) -> dict:
    """PSNR of every image, and how many layers got what."""
    plan = case.plan(steps, seed, **options)
    images = case.images(dq.apply(case.denoiser, plan, backend="simulate"), len(reference))
    layers = plan.layers.values()
    return {
        "psnr": image_psnr(images, reference),
        "groups": max(len(groups) for groups in plan.groups.values()),
        "layers": {
            part: sum(getattr(p, part) is not None for p in layers)
            for part in ("balance", "rotation", "low_rank", "subspace")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", choices=MODELS)
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--act-bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32, help="inputs that share a scale of a weight")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--ingredients", nargs="+", default=INGREDIENTS[:4], choices=INGREDIENTS, help="only these")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, help="of sampling")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("transforms-work"), help="folder for recordings")
    args = parser.parse_args()
    args.steps = args.steps or usual_steps(args.model)
    options = {"weight_bits": args.weight_bits, "act_bits": args.act_bits, "weight_group_size": args.group_size}
    settings = {"model": args.model, "images": args.images, "steps": args.steps, "rank": args.rank, **options}
    kind = "-principal" if "principal" in args.ingredients else ""
    name = f"transforms-{args.model}-w{args.weight_bits}a{args.act_bits}{kind}"
    records = Records(name, settings, args.out)
    case = Case(args.model, args.steps, args.work / f"{args.model}-{args.steps}")
    reference = case.images(case.denoiser, args.images)
    for seed, chosen in itertools.product(range(args.seeds), _combinations(args.ingredients)):
        run = partial(measure, case, steps_of(chosen, args.rank), seed, reference, options)
        print(
            f"{label_of(chosen)}, {seed}:",
            np.median(records.get(f"{label_of(chosen)}, {seed}", run)["psnr"]),
            flush=True,
        )
    found = derive(records.path.stem, records.data)
    title = f"{args.model}, W{args.weight_bits}A{args.act_bits}, {args.images} images x {args.seeds} seeds"
    cells = found["combinations"].items()
    print(Table([title, "PSNR, median", "worst"], [[label, each["median"], each["worst"]] for label, each in cells]))
    effects = found["effects"].items()
    print(Table(["error power times", "mean", "from", "to"], [[label, *interval] for label, interval in effects]))


if __name__ == "__main__":
    main()
