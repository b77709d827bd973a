"""``dq-plugins demo``: the main job on a bundled denoiser, with a report."""

from __future__ import annotations

import argparse
from pathlib import Path

from dq_plugins.bundled_denoisers import NAMES
from dq_plugins.commands.arguments import positive, registered

HELP = "Quantize a bundled denoiser to W8A8 through torchao and write a report with pictures, errors, size and speed."
EXAMPLE = "dq-plugins demo --out demo-report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo-report", help="folder for the report, the plan and the recorded calls")
    parser.add_argument("--model", default="emoji", choices=NAMES, help="bundled denoiser")
    parser.add_argument("--recipe", type=registered("recipe"), default="default", help="registered recipe")
    parser.add_argument("--weight-bits", type=positive, default=8, help="width of weights")
    parser.add_argument("--act-bits", type=positive, default=8, help="width of activations")
    parser.add_argument("--groups", type=positive, default=8, help="timestep groups")
    parser.add_argument("--no-compile", action="store_true", help="skip the compiled denoisers: most of the time")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calibration images")


def run(args: argparse.Namespace) -> int:
    import time

    from dq_plugins.demo import run_demo
    from dq_plugins.plots import pairs_of_images
    from dq_plugins.report.demo_page import demo_page, summary_table
    from dq_plugins.report.execution import execution_table

    out, start = Path(args.out), time.perf_counter()
    result = run_demo(
        out,
        args.model,
        recipe=args.recipe,
        weight_bits=args.weight_bits,
        act_bits=args.act_bits,
        groups=args.groups,
        compiled=not args.no_compile,
        seed=args.seed,
        say=lambda step: print(f"[{time.perf_counter() - start:5.0f} s] {step}", flush=True),
    )
    page = demo_page(result).save(out / "report.html")
    pairs_of_images(result.images, result.titles).savefig(out / "images.png", dpi=150)
    print(f"\n{summary_table(result)}\n\n{execution_table(result.executions)}\n")
    print(f"report: {page}   ({time.perf_counter() - start:.0f} s)")
    return 0
