"""``dq-plugins evaluate``: output error of a plan, per timestep."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from dq_plugins.commands.arguments import MODEL_HELP, calibration_folder, model, plan_folder, registered
from dq_plugins.report import Table

HELP = "Measure the output error of a plan on recorded calls, per timestep."
EXAMPLE = "dq-plugins evaluate digits plan/ held-out-calib/ --backend torchao --backend simulate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=model, help=MODEL_HELP)
    parser.add_argument("plan", type=plan_folder, help="folder of a plan")
    parser.add_argument(
        "calibration", type=calibration_folder, help="recorded calls, best not those of the plan (another --seed)"
    )
    backend = "adapter; repeat to compare (default: torchao)"
    parser.add_argument("--backend", type=registered("adapter"), action="append", help=backend)
    parser.add_argument("--json", action="store_true", help="print {backend: {timestep: dB}}")


def sqnr_table(found: Mapping[str, Mapping[float, float]]) -> Table:
    """Output SQNR in dB by timestep, one column for each name."""
    timesteps = next(iter(found.values()))
    rows = [[t, *(round(values[t], 1) for values in found.values())] for t in timesteps]
    return Table(["timestep", *(f"SQNR dB, {name}" for name in found)], rows)


def run(args: argparse.Namespace) -> int:
    import json

    from dq_plugins.application import apply
    from dq_plugins.calibration import CalibrationSet
    from dq_plugins.libraries import load_denoiser
    from dq_plugins.metrics.output_error import output_sqnr
    from dq_plugins.plan import QuantPlan

    _, denoiser = load_denoiser(args.model)
    plan, calls = QuantPlan.load(args.plan), CalibrationSet.open(args.calibration)
    found = {name: output_sqnr(apply(denoiser, plan, name), calls) for name in args.backend or ["torchao"]}
    print(json.dumps(found, indent=1) if args.json else sqnr_table(found))
    return 0
