"""``dq-plugins evaluate``: output error of a plan, per timestep."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dq_plugins.report import Table

if TYPE_CHECKING:
    from torch import nn

    from dq_plugins.calibration import CalibrationSet

HELP = "Measure the output error of a plan on recorded calls, per timestep."
EXAMPLE = "dq-plugins evaluate examples/denoisers/digits plan/ held-out-calib/ --backend torchao --backend simulate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder of a diffusers pipeline")
    parser.add_argument("plan", help="folder of a plan")
    parser.add_argument("calibration", help="recorded calls, best not those of the plan (another --seed)")
    parser.add_argument("--backend", action="append", help="adapter; repeat to compare (default: torchao)")
    parser.add_argument("--json", action="store_true", help="print {backend: {timestep: dB}}")


def sqnr_table(models: dict[str, nn.Module], calls: CalibrationSet) -> Table:
    """Output SQNR in dB by timestep, one column per model."""
    from dq_plugins.metrics.output_error import output_sqnr

    found = {name: output_sqnr(model, calls) for name, model in models.items()}
    rows = [[t, *(round(values[t], 1) for values in found.values())] for t in calls.timesteps]
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
    models = {name: apply(denoiser, plan, name) for name in args.backend or ["torchao"]}
    if args.json:
        print(json.dumps({name: output_sqnr(model, calls) for name, model in models.items()}, indent=1))
    else:
        print(sqnr_table(models, calls))
    return 0
