"""``dq-plugins apply``: how each layer of a plan executes in a backend."""

from __future__ import annotations

import argparse

from dq_plugins.commands.arguments import MODEL_HELP, model, plan_folder, registered

HELP = "Apply a plan to a model and show how each layer executes: integer, simulated or full precision, and why."
EXAMPLE = "dq-plugins apply digits plan/ --backend torchao"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=model, help=MODEL_HELP)
    parser.add_argument("plan", type=plan_folder, help="folder of a plan")
    parser.add_argument(
        "--backend", type=registered("adapter"), default="torchao", help="adapter that executes the plan"
    )
    parser.add_argument("--json", action="store_true", help="print {layer: execution}")


def run(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from dq_plugins.application import apply
    from dq_plugins.libraries import load_denoiser
    from dq_plugins.plan import QuantPlan
    from dq_plugins.report.execution import executions, layer_table

    _, denoiser = load_denoiser(args.model)
    plan = QuantPlan.load(args.plan)
    found = executions(apply(denoiser, plan, args.backend), plan)
    if args.json:
        print(json.dumps({name: asdict(e) for name, e in found.items()}, indent=1))
    else:
        print(layer_table(found))
    return 0
