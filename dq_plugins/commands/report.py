"""``dq-plugins report``: a plan as one self-contained HTML page."""

from __future__ import annotations

import argparse
import json
import webbrowser

from dq_plugins.commands.arguments import plan_folder

HELP = "Write a plan as one self-contained HTML page: widths, timestep groups, what each group buys, every layer."
EXAMPLE = "dq-plugins report plan/ --out report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=plan_folder, help="folder of a plan")
    parser.add_argument("--out", default="report.html", help="file to write")
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    parser.add_argument("--json", action="store_true", help="print the file's name as JSON")


def run(args: argparse.Namespace) -> int:
    from dq_plugins.plan import QuantPlan
    from dq_plugins.report.plan_page import plan_page

    page = plan_page(QuantPlan.load(args.plan)).save(args.out)
    print(json.dumps({"report": str(page)}) if args.json else f"written: {page}")
    if args.open:
        webbrowser.open(page.absolute().as_uri())
    return 0
