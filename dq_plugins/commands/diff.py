"""``dq-plugins diff``: what differs between two plans."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from dq_plugins.commands.arguments import plan_folder

HELP = "Compare two plans, decision by decision. Exit status 0 when equal, 1 when they differ."
EXAMPLE = "dq-plugins diff plan-a/ plan-b/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("left", type=plan_folder, help="folder of a plan")
    parser.add_argument("right", type=plan_folder, help="folder of another plan")
    parser.add_argument("--json", action="store_true", help="print a JSON list of {where, left, right}")


def run(args: argparse.Namespace) -> int:
    from dq_plugins.plan import QuantPlan
    from dq_plugins.plan.diff import diff_plans

    differences = diff_plans(QuantPlan.load(args.left), QuantPlan.load(args.right))
    print(json.dumps([asdict(d) for d in differences], indent=1) if args.json else differences)
    return 1 if differences else 0
