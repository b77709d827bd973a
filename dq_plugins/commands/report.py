"""``dq-plugins report``: a plan as one self-contained HTML page."""

from __future__ import annotations

import argparse

HELP = "Write a plan as one self-contained HTML page: widths, timestep groups, what each group buys, every layer."
EXAMPLE = "dq-plugins report plan/ --out report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", help="folder of a plan")
    parser.add_argument("--out", default="report.html", help="file to write")


def run(args: argparse.Namespace) -> int:
    from dq_plugins.plan import QuantPlan
    from dq_plugins.report.plan_page import plan_page

    print(f"written: {plan_page(QuantPlan.load(args.plan)).save(args.out)}")
    return 0
