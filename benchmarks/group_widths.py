"""Widths of inputs by layer and timestep group, and steps that stay in floating point, by the error of final images.

    python -m benchmarks.group_widths --model digits --part widths --act-bits 5
    python -m benchmarks.group_widths --model digits --part steps --act-bits 8
    python -m benchmarks.group_widths --model emoji --part wider --act-bits 4

``widths``: at equal mean bits of an input, the exact program over (layer, group) beside beam search and greedy over the
same measurements, one width for every layer, and the exact program with one group. ``steps``: the first and the last
steps in floating point, as serving engines have it, with one range for all steps and with groups. ``wider``: the first
or the last steps with inputs of 8 bits, the rest of the plan as `default` makes it with 4-bit weights; and the exact
program over its layers and groups, at the mean bits that it has.

Each seed records its own calibration images and is judged on others, from the same noise as full precision. Fake
quantization (backend ``simulate``): this measures error, not speed.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import dq_plugins as dq
from benchmarks.derived import derive
from benchmarks.records import RESULTS, Records
from benchmarks.tfmq import MODELS, Case, image_psnr, usual_steps
from dq_plugins.passes.allocation.group_widths import GroupWidthFindings, GroupWidths
from dq_plugins.passes.width_candidates import activation_candidates
from dq_plugins.plan.step_policy import StepPolicy, with_policy
from dq_plugins.quantized.layer_transform import transforms_of
from dq_plugins.recipe import PassContext, Step
from dq_plugins.report import Table

POLICIES = ((0, 0), (1, 1), (2, 2), (3, 3), (6, 0), (0, 6))
WIDER = ((0, 0), (1, 0), (0, 1), (0, 2), (0, 3))


def ranges(groups: int) -> tuple[Step, ...]:
    """Ranges in so many groups."""
    method = "uniform" if groups == 1 else "dp"
    observer = {"observer": "by-width"}
    grouping = Step("timestep-groups", {"groups": groups, "method": method})
    return Step("weight-ranges", {"embedding_bits": 8}), grouping, Step("activation-ranges", observer)


SOLVERS = ("greedy", "beam", "exact")
CHOICES = (3, 4, 5, 6, 8)


def judged(case: Case, plan: dq.QuantPlan, reference: np.ndarray) -> dict[str, Any]:
    """PSNR of every image."""
    images = case.images(dq.apply(case.denoiser, plan, backend="simulate"), len(reference))
    return {"psnr": image_psnr(images, reference)}


class Widths:
    """Plans of one seed and number of groups, over the same measurements."""

    def __init__(self, case: Case, groups: int, seed: int, act_bits: int) -> None:
        self.case, self.act_bits = case, act_bits
        self.base = case.plan(ranges(groups), seed, weight_bits=8, act_bits=8, edge_bits=2)
        folder = case.folder / f"measured-{groups}-{seed}"
        self.context = PassContext(case.denoiser, case.calibration(seed), self.base.targets, seed, workdir=folder)

    def run(self, reference: np.ndarray, **options: Any) -> dict[str, Any]:
        """A plan, what its program predicts, and its images."""
        plan = copy.deepcopy(self.base)
        shared = {"act_bits": float(self.act_bits), "choices": CHOICES, "seconds": 5.0, **options}
        list(GroupWidths(**shared).run(plan, self.context))
        found = plan.sections["group-widths"].read(GroupWidthFindings, "group-widths")
        said = {"predicted": found.error, "bound": found.bound, "status": found.status}
        return {**judged(self.case, plan, reference), **said}


def widths(case: Case, seed: int, groups: int, act_bits: int, reference: np.ndarray, records: Records) -> None:
    """Every way to choose, of one seed and number of groups."""
    made: list[Widths] = []

    def run(**options: Any) -> dict[str, Any]:
        if not made:
            made.append(Widths(case, groups, seed, act_bits))
        return made[0].run(reference, **options)

    if groups > 1:
        records.get(f"one width, {groups} groups, {seed}", partial(run, choices=(act_bits,)))
    for solver in SOLVERS if groups > 1 else ("exact",):
        label = f"{solver}, {groups} {'groups' if groups > 1 else 'group'}"
        print(label, records.get(f"{label}, {seed}", partial(run, solver=solver)), flush=True)


def exceptions(case: Case, seed: int, groups: int, act_bits: int, reference: np.ndarray, records: Records) -> None:
    """Every step policy, of one seed and number of groups."""
    plan: dq.QuantPlan | None = None
    for first, last in POLICIES:
        label = f"{groups} {'groups' if groups > 1 else 'group'}, first {first} and last {last}, {seed}"
        if label in records.data:
            continue
        plan = plan or case.plan(ranges(groups), seed, weight_bits=8, act_bits=act_bits)
        records.put(label, judged(case, with_policy(plan, StepPolicy(first, last)), reference))
        print(label, flush=True)


def wider(case: Case, seed: int, act_bits: int, reference: np.ndarray, records: Records) -> None:
    """The first or the last steps with inputs of 8 bits, of one seed."""
    recipe = dq.get("recipe", "default")
    plan = case.plan(recipe.steps, seed, weight_bits=4, act_bits=act_bits, **recipe.targets)
    transforms = transforms_of(plan.layers)
    context = PassContext(case.denoiser, case.calibration(seed), plan.targets, seed, transforms=transforms)
    inputs = {name: layer.activation for name, layer in plan.layers.items() if layer.activation is not None}
    narrow = [name for name, quant in inputs.items() if quant.bits < 8]
    found = activation_candidates(plan, context, narrow, (8,))
    wide = {name: found[name][8] for name in narrow}
    for first, last in WIDER:
        label = f"first {first} and last {last} with 8 bits, {seed}"
        followed = with_policy(plan, StepPolicy(first, last), wide)
        print(label, records.get(label, partial(judged, case, followed, reference)), flush=True)

    def exact() -> dict[str, Any]:
        chosen = copy.deepcopy(plan)
        list(GroupWidths(act_bits="plan", choices=CHOICES, seconds=10.0).run(chosen, context))
        return judged(case, chosen, reference)

    print(records.get(f"exact program, bits of the plan, {seed}", exact), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", choices=MODELS)
    parser.add_argument("--part", default="widths", choices=("widths", "steps", "wider"))
    parser.add_argument("--act-bits", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of sampling")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("group-widths-work"), help="folder for recordings")
    args = parser.parse_args()
    steps = args.steps or usual_steps(args.model)
    settings = {"model": args.model, "images": args.images, "steps": steps, "act_bits": args.act_bits}
    records = Records(f"group_{args.part}-{args.model}-a{args.act_bits}", settings, args.out)
    case = Case(args.model, steps, args.work / f"{args.model}-{steps}")
    reference = case.images(case.denoiser, args.images)
    part = widths if args.part == "widths" else exceptions
    for groups in (8, 1) if args.part != "wider" else ():
        for seed in range(args.seeds):
            part(case, seed, groups, args.act_bits, reference, records)
    for seed in range(args.seeds) if args.part == "wider" else ():
        wider(case, seed, args.act_bits, reference, records)
    rows = [[label, *row.values()] for label, row in derive(records.path.stem, records.data).items()]
    print(Table(["", "PSNR, median", "worst", "error power", "median of seeds"], rows))


if __name__ == "__main__":
    main()
