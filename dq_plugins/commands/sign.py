"""``dq-plugins sign``: accept what a person has changed in plan.json."""

from __future__ import annotations

import argparse
import json

HELP = "Accept an edit of plan.json: check the whole plan, and write it under its new hash."
EXAMPLE = """\
$EDITOR plan/plan.json
dq-plugins sign plan/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", help="folder of a plan, or its plan.json")
    parser.add_argument("--json", action="store_true", help="print the file's name and the plan's hash")


def run(args: argparse.Namespace) -> int:
    """Sign the plan, and print what it says now."""
    from pathlib import Path

    from dq_plugins.plan import PLAN
    from dq_plugins.plan.quant_plan import PLAN_NAME

    given = Path(args.plan)
    path = given if given.name == PLAN_NAME else given / PLAN_NAME
    plan = PLAN.sign(path)
    if args.json:
        print(json.dumps({"plan": str(path), "hash": plan.hash}))
        return 0
    print(f"{plan}\n\nplan {plan.hash[:12]} in {path} is signed")
    return 0
