"""``dq-plugins quantize``: record, plan and check in one command."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq_plugins.commands.arguments import MODEL_HELP, model, registered
from dq_plugins.commands.plan import add_recipe_arguments, add_worker_argument, check_recipe, run_recipe, summary

if TYPE_CHECKING:
    from torch import nn

HELP = "Quantize the denoiser of a diffusers pipeline: record, plan, apply, measure."
EXAMPLE = "dq-plugins quantize digits --recipe default --weight-bits 8 --out ./quantized"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from dq_plugins.commands.record import add_sampling_arguments

    parser.add_argument("model", type=model, help=MODEL_HELP)
    parser.add_argument(
        "--out",
        required=True,
        help="folder for calib/, plan/, of each denoiser, and pipeline/; the same command resumes",
    )
    parser.add_argument(
        "--backend", type=registered("adapter"), default="torchao", help="adapter that executes the plan"
    )
    parser.add_argument(
        "--prefer",
        choices=["smallest", "fastest"],
        default="smallest",
        help="fastest: with backend torchao, what is faster in floating point on this machine stays there",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    add_sampling_arguments(parser)
    add_recipe_arguments(parser)
    add_worker_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Record into ``out/calib``, plan into ``out/plan``, apply, print the error per timestep, save the pipeline."""
    from dq_plugins.application import executor
    from dq_plugins.exclusive import exclusive
    from dq_plugins.workers import workers

    check_recipe(args)
    executor(args.backend)
    out = Path(args.out)
    with exclusive(out), workers(args.workers):
        found = _quantize(args, out)
    if args.json:
        print(json.dumps(found, indent=1))
    return 0


def _quantize(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Every chosen denoiser of the pipeline; what was decided and measured, as JSON data."""
    from dq_plugins.libraries import adapter, load_denoiser
    from dq_plugins.run_record import RUN, RUN_NAME, RunRecord

    diffusers = adapter("diffusers")
    pipe, _ = load_denoiser(args.model, args.component)  # raises where there is none
    chosen = [args.component] if args.component else list(diffusers.denoisers_of(pipe))
    quantized, told = {}, {}
    for name in chosen:
        args.component = name
        if len(chosen) > 1 and not args.json:
            print(f"{name}:")
        quantized[name], told[name] = _quantize_component(args, pipe, out if len(chosen) == 1 else out / name)
    names = ("steps", "images", "batch", "prompts", "classes", "guidance_scale", "call", "seed")
    sampling = {name: getattr(args, name) for name in names}
    source = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model  # a name on the hub
    RUN.write(out / RUN_NAME, RunRecord(source, tuple(chosen), args.backend, sampling))
    saved = diffusers.save_pipeline(pipe, quantized, out / "pipeline")
    if saved and not args.json:
        print(f"quantized pipeline written to {saved}; load it with dq_diffusers.load_pipeline({str(saved)!r})")
    return {"pipeline": str(saved) if saved else None, "denoisers": told}


def _quantize_component(args: argparse.Namespace, pipe: Any, out: Path) -> tuple[nn.Module, dict[str, Any]]:
    from dq_plugins.application import apply
    from dq_plugins.commands.evaluate import sqnr_table
    from dq_plugins.commands.record import record_pipeline
    from dq_plugins.libraries import adapter
    from dq_plugins.metrics.output_error import output_sqnr
    from dq_plugins.report.plan_page import width_table

    denoiser = adapter("diffusers").denoisers_of(pipe)[args.component].eval().requires_grad_(False)
    calibration = record_pipeline(args, pipe, denoiser, out / "calib")
    plan = run_recipe(args, denoiser, calibration, out / "plan")
    if not args.json:
        print(f"{width_table(plan)}\n")
    measured: dict[str, Any] = {}
    if args.prefer == "fastest":
        measured = {"prefer": args.prefer, "example_inputs": calibration.example_inputs()}
    quantized = apply(denoiser, plan, args.backend, **measured)
    sqnr = output_sqnr(quantized, calibration)
    if not args.json:
        print(sqnr_table({args.backend: sqnr}))
        print(
            f"\nplan written to {out / 'plan'}; use it with dq_plugins.apply(denoiser, plan, backend={args.backend!r})"
        )
    return quantized, {"plan": summary(plan, out / "plan"), "sqnr": sqnr}
