"""Widths of inputs by layer and timestep group, and steps that stay in floating point, by the error of final images.

    python -m benchmarks.group_widths --model digits --part widths --act-bits 5
    python -m benchmarks.group_widths --model digits --part steps --act-bits 8

``widths``: at equal mean bits of an input, the exact program over (layer, group) beside beam search and greedy over the
same measurements, one width for every layer, and the exact program with one group. ``steps``: the first and the last
steps in floating point, as serving engines have it, with one range for all steps and with groups.

Each seed records its own calibration images and is judged on others, from the same noise as full precision. Fake
quantization (backend ``simulate``): this measures error, not speed.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import dq_plugins as dq
from benchmarks.derived import derive
from benchmarks.records import RESULTS, Records
from benchmarks.tfmq import MODELS, Case, image_psnr, usual_steps
from dq_plugins.passes.allocation.group_widths import GroupWidthFindings
from dq_plugins.plan.step_policy import StepPolicy, with_policy
from dq_plugins.recipe import Step
from dq_plugins.report import Table

POLICIES = ((0, 0), (1, 1), (2, 2), (3, 3), (6, 0), (0, 6))


def ranges(groups: int) -> tuple[Step, ...]:
    """Ranges in so many groups."""
    method = "uniform" if groups == 1 else "dp"
    observer = {"observer": "by-width"}
    grouping = Step("timestep-groups", {"groups": groups, "method": method})
    return Step("weight-ranges", {"embedding_bits": 8}), grouping, Step("activation-ranges", observer)


def width_variants(act_bits: float) -> dict[str, tuple[Step, ...]]:
    """What is compared at equal mean bits."""
    choices = (3, 4, 5, 6, 8)
    shared = {"act_bits": act_bits, "choices": choices, "seconds": 10.0}
    found = {"one width": (*ranges(8), Step("group-widths", {**shared, "choices": (int(act_bits),)}))}
    found["exact, one group"] = (*ranges(1), Step("group-widths", shared))
    for solver in ("greedy", "beam", "exact"):
        found[f"{solver}, 8 groups"] = (*ranges(8), Step("group-widths", {**shared, "solver": solver}))
    return found


def judged(case: Case, plan: dq.QuantPlan, reference: np.ndarray) -> dict[str, Any]:
    """PSNR of every image."""
    images = case.images(dq.apply(case.denoiser, plan, backend="simulate"), len(reference))
    return {"psnr": image_psnr(images, reference)}


def with_widths(case: Case, steps: tuple[Step, ...], seed: int, reference: np.ndarray) -> dict[str, Any]:
    """A plan, what its program predicts, and its images."""
    plan = case.plan(steps, seed, weight_bits=8, act_bits=8, edge_bits=2)
    found = plan.sections["group-widths"].read(GroupWidthFindings, "group-widths")
    said = {"predicted": found.error, "bound": found.bound, "status": found.status}
    return {**judged(case, plan, reference), **said}


def with_steps(
    case: Case, groups: int, policy: tuple[int, int], seed: int, bits: int, reference: np.ndarray
) -> dict[str, Any]:
    """A plan that keeps some steps in floating point, and its images."""
    plan = case.plan(ranges(groups), seed, weight_bits=8, act_bits=bits)
    return judged(case, with_policy(plan, StepPolicy(*policy)), reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", choices=MODELS)
    parser.add_argument("--part", default="widths", choices=("widths", "steps"))
    parser.add_argument("--act-bits", type=int, default=5)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("group-widths-work"), help="folder for recordings")
    args = parser.parse_args()
    steps = usual_steps(args.model)
    settings = {"model": args.model, "images": args.images, "steps": steps, "act_bits": args.act_bits}
    records = Records(f"group_{args.part}-{args.model}-a{args.act_bits}", settings, args.out)
    case = Case(args.model, steps, args.work / f"{args.model}-{steps}")
    reference = case.images(case.denoiser, args.images)
    for seed in range(args.seeds):
        if args.part == "widths":
            for label, passes in width_variants(args.act_bits).items():
                print(records.get(f"{label}, {seed}", partial(with_widths, case, passes, seed, reference)), flush=True)
            continue
        for groups in (1, 8):
            for policy in POLICIES:
                label = f"{groups} {'group' if groups == 1 else 'groups'}, first {policy[0]} and last {policy[1]}"
                run = partial(with_steps, case, groups, policy, seed, args.act_bits, reference)
                print(label, records.get(f"{label}, {seed}", run), flush=True)
    rows = [[label, *row.values()] for label, row in derive(records.path.stem, records.data).items()]
    print(Table(["", "PSNR, median", "worst", "error power", "median of seeds"], rows))


if __name__ == "__main__":
    main()
