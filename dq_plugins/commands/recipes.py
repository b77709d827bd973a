"""``dq-plugins recipes``: what each recipe does, pass by pass."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

from dq_plugins import registry
from dq_plugins.commands.arguments import registered

HELP = "Explain the recipes: what each is for, what it costs, and its passes in order."
GENERAL = ("fast", "default", "best", "low-bit", "mixed-precision")
"""Shown first; the others are for a subject of their own."""
USE = "dq-plugins quantize PIPELINE --recipe NAME --out FOLDER    # --option PASS.NAME=VALUE sets an option"
EXAMPLE = """\
dq-plugins recipes
dq-plugins recipes best --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", type=registered("recipe"), help="only these (default: all)")
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run(args: argparse.Namespace) -> int:
    general_first = sorted(registry.names("recipe"), key=lambda name: (*(name != each for each in GENERAL), name))
    found = [explained(name) for name in args.names or general_first]
    print(json.dumps(found, indent=1) if args.json else "\n\n".join([*map(paragraph, found), USE]))
    return 0


def explained(name: str) -> dict[str, Any]:
    """A recipe as JSON data: its summary, and what each pass does with which options."""
    recipe = registry.get("recipe", name)
    passes = [
        {"pass": step.name, "what": registry.find("pass", step.name).summary, "options": dict(step.options)}
        for step in recipe.steps
    ]
    return {"name": name, "summary": recipe.summary, "targets": dict(recipe.targets), "passes": passes}


def paragraph(recipe: dict[str, Any]) -> str:
    """A recipe as text."""
    width = max(len(each["pass"]) for each in recipe["passes"])
    lines = [f"{recipe['name']}", *textwrap.wrap(recipe["summary"], 100, initial_indent="  ", subsequent_indent="  ")]
    for each in recipe["passes"]:
        options = ", ".join(f"{name}={value}" for name, value in each["options"].items())
        lines.append(f"    {each['pass']:{width}}  {each['what']}{f'  ({options})' if options else ''}")
    return "\n".join(lines)
