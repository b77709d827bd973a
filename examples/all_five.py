"""All five methods in one plan, on a bundled denoiser, from recording to integers.

    python examples/all_five.py [--model digits | emoji] [--out all-five]

| method | what it decides here |
|---|---|
| ADP-DM | which timesteps share activation ranges, by differentiable search |
| MixDQ | outlier text tokens kept exact; how much every width of every layer costs |
| BinaryDM | what one bit of a weight means, where the search takes one bit |
| TMPQ-DM | the timesteps that sampling visits and the widths of all layers, within one budget |
| TFMQ-DM | the rounding of the temporal block and of the blocks, and ranges for the timesteps that are left |

The folder then holds the plan, a table, and images: full precision over all steps, and the plan in integers. The search
takes a few minutes; interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dq_diffusers import install_schedule
from dq_diffusers.recording import denoiser_of, load_pipeline, sampler

import dq_plugins as dq
from dq_plugins.bundled_denoisers import NAMES, bundled
from dq_plugins.demo import PROMPTS
from dq_plugins.plots import pairs_of_images
from dq_plugins.recipe import Recipe, Step
from dq_plugins.report.execution import executions
from dq_plugins.sensitivity.sensitivity_table import SensitivityTable


def recipe(steps: tuple[int, ...], effort: int) -> Recipe:
    """The five methods, in the order in which each finds what it needs.

    Args:
        steps: numbers of sampling steps to choose from; the first sets the budget.
        effort: scales what each search may try.
    """
    search = {"population": 4 * effort, "parents": effort, "mutants": 2 * effort, "crossovers": effort}
    return Recipe(
        "all-five",
        "ADP-DM, MixDQ, BinaryDM, TMPQ-DM and TFMQ-DM in one plan",
        (
            Step("weight-ranges"),
            Step("timestep-groups", {"method": "search", "groups": 4, "rounds": 4 * effort}),
            Step("activation-ranges"),
            Step("bos-tokens"),
            Step("sensitivity", {"weight_choices": (1, 3, 4, 6, 8), "act_choices": (4, 6, 8), "draws": 20 * effort}),
            Step("timestep-reduction", {"steps": steps, "generations": effort, "seconds": 2.0, **search}),
            Step("temporal-reconstruction", {"iterations": 100 * effort}),
            Step("finite-set-ranges"),
            Step("block-reconstruction", {"iterations": 20 * effort}),
            Step("temporal-table"),
        ),
    )


def conditions(model: str, images: int) -> dict[str, Any]:
    """What to draw."""
    return {"prompts": (list(PROMPTS[model]) * images)[:images]} if model in PROMPTS else {}


def sample(pipe: Any, denoiser: torch.nn.Module, args: argparse.Namespace) -> np.ndarray:
    """The same images from any denoiser, ``[images, height, width, channels]``."""
    run = sampler(pipe, steps=args.steps, images=args.images, seed=1000, **conditions(args.model, args.images))
    return np.concatenate([np.asarray(batch.images) for batch in run(denoiser)])


def summary(plan: dq.QuantPlan, quantized: torch.nn.Module, psnr: float) -> dict[str, str]:
    """What each method did."""
    searched, groups = plan.sections["timestep-reduction"].data, plan.sections["timestep-groups"].data["search"]
    temporal = plan.sections["temporal-reconstruction"].data
    blocks = plan.sections["block-reconstruction"].data["blocks"].values()
    one_bit = [n for n, p in plan.layers.items() if p.weight is not None and not p.weight.rounds]
    bits = [p.weight.bits for p in plan.layers.values() if p.weight is not None]
    states = Counter(e.state for e in executions(quantized, plan).values())
    better = sum(not block["kept_start"] for block in blocks)
    return {
        "ADP-DM": f"{len(plan.groups['default'])} timestep groups; best of three: {groups['kept']}",
        "MixDQ": f"{len(SensitivityTable.of(plan.sensitivity).noise)} sensitivities; "
        f"{len(plan.outlier_rows)} layers with exact tokens",
        "BinaryDM": f"{len(one_bit)} layers of one bit",
        "TMPQ-DM": f"{len(plan.schedule)} -> {len(plan.sampling or ())} steps, mean of {np.mean(bits):.1f} bits; "
        f"{searched['cost'] / searched['budget']:.0%} of the budget; found by {searched['chosen_by']}",
        "TFMQ-DM": f"{len(temporal.get('layers', ()))} temporal layers and {better} of {len(blocks)} blocks rounded",
        "runs": ", ".join(f"{count} layers {state}" for state, count in states.items()),
        "images": f"{psnr:.1f} dB to full precision over {len(plan.schedule)} steps",
    }


def main() -> None:
    """Record, plan, apply, sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMES, default="digits")
    parser.add_argument("--out", type=Path, default=Path("all-five"))
    parser.add_argument("--steps", type=int, default=40, help="of the recording")
    parser.add_argument("--keep", type=int, nargs="+", default=(12, 9, 15), help="numbers of steps to choose from")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--weight-bits", type=int, default=4, help="of the budget")
    parser.add_argument("--act-bits", type=int, default=8, help="of the budget")
    parser.add_argument("--effort", type=int, default=4)
    args = parser.parse_args()

    pipe = load_pipeline(bundled(args.model))
    pipe.set_progress_bar_config(disable=True)
    # clipping at every step makes the image depend on the number of steps, so that few would not approach many
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=False)
    _, denoiser = denoiser_of(pipe)
    denoiser.eval().requires_grad_(False)
    drawn = sampler(pipe, steps=args.steps, images=args.images, **conditions(args.model, args.images))
    calibration = dq.record(denoiser, drawn, args.out / "calibration")
    plan = dq.make_plan(
        denoiser,
        calibration,
        recipe(tuple(args.keep), args.effort),
        weight_bits=args.weight_bits,
        act_bits=args.act_bits,
        workdir=args.out / "work",
    )
    plan.save(args.out / "plan")

    full = sample(pipe, denoiser, args)
    plan = dq.QuantPlan.load(args.out / "plan")
    quantized = dq.apply(denoiser, plan, backend="torchao", uniform_timesteps=True)
    install_schedule(pipe, plan)
    few = sample(pipe, quantized, args)
    psnr = -10 * np.log10(np.square(full - few).mean())
    found = summary(plan, quantized, psnr)
    print("\n".join(f"{name:9} {what}" for name, what in found.items()))
    (args.out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    rows = {"full precision": list(full.squeeze(-1) if full.shape[-1] == 1 else full)}
    rows["in integers"] = list(few.squeeze(-1) if few.shape[-1] == 1 else few)
    pairs_of_images(rows, [f"noise {i}" for i in range(len(full))]).savefig(args.out / "images.png", dpi=110)


if __name__ == "__main__":
    main()
