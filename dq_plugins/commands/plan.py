"""``dq-plugins plan``: run a recipe on a recorded calibration set."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from dq_plugins.commands.arguments import MODEL_HELP, calibration_folder, model, positive, registered

if TYPE_CHECKING:
    from torch import nn

    from dq_plugins.calibration import CalibrationSet
    from dq_plugins.plan import QuantPlan

HELP = "Make a quantization plan from a model and its calibration set."
EXAMPLE = """
dq-plugins record digits --out calib/ --steps 20 --images 16
dq-plugins plan digits calib/ --recipe default --weight-bits 8 --act-bits 8 --out plan/
"""


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every command that runs a recipe."""
    parser.add_argument(
        "--recipe", type=registered("recipe"), default="default", help="recipe by name, see dq-plugins recipes"
    )
    parser.add_argument("--weight-bits", type=positive, default=8, help="target width of weights")
    parser.add_argument(
        "--act-bits", type=positive, default=8, help="target width of activations; 32 leaves them alone"
    )
    parser.add_argument(
        "--edge-bits", type=positive, help="least width of the first and last layers (default: the recipe's)"
    )
    parser.add_argument(
        "--condition-bits",
        type=positive,
        help="least width of inputs that depend on timestep and conditions alone (default: the recipe's)",
    )
    for name, what in (("weights", "weights"), ("acts", "activations")):
        parser.add_argument(
            f"--symmetric-{name}",
            action=argparse.BooleanOptionalAction,
            help=f"whether {what} have zero point 0 (default: the recipe's)",
        )
    parser.add_argument(
        "--weight-group-size",
        type=int,
        help="input channels that share a scale of a weight of at most 6 bits (default: the recipe's, mostly all)",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="PASS.NAME=VALUE",
        help="option of a pass, for example timestep-groups.groups=4; repeatable",
    )


def add_worker_argument(parser: argparse.ArgumentParser) -> None:
    """The argument of every command whose work processes can share: ``with workers(args.workers)``."""
    parser.add_argument(
        "--workers",
        type=positive,
        default=1,
        metavar="N",
        help="processes that share the work, with the same result; give each a part of the cores: OMP_NUM_THREADS",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=model, help=MODEL_HELP)
    parser.add_argument("calibration", type=calibration_folder, help="folder written by dq-plugins record")
    parser.add_argument("--out", required=True, help="folder for the plan; the same command resumes there")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice")
    parser.add_argument("--json", action="store_true", help="print a JSON summary of the plan")
    add_recipe_arguments(parser)
    add_worker_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Make and save the plan, and print what it decided."""
    from dq_plugins.calibration import CalibrationSet
    from dq_plugins.exclusive import exclusive
    from dq_plugins.libraries import load_denoiser
    from dq_plugins.report.plan_page import width_table
    from dq_plugins.workers import workers

    check_recipe(args)
    with exclusive(args.out), workers(args.workers):
        _, denoiser = load_denoiser(args.model)
        plan = run_recipe(args, denoiser, CalibrationSet.open(args.calibration), Path(args.out))
    if args.json:
        print(json.dumps(summary(plan, args.out), indent=1))
    else:
        print(f"{width_table(plan)}\n\nplan {plan.hash[:12]} written to {args.out}")
    return 0


def summary(plan: QuantPlan, folder: str | Path) -> dict[str, object]:
    """What a plan decided and where it lies, as JSON data."""
    return {
        "folder": str(folder),
        "hash": plan.hash,
        "model": plan.model,
        "recipe": plan.recipe,
        "groups": {name: len(groups) for name, groups in plan.groups.items()},
        "widths": dict(Counter(layer.width for layer in plan.layers.values())),
    }


def check_recipe(args: argparse.Namespace) -> None:
    """Refuse what `make_plan` would refuse of recipe, options and widths, before anything is recorded or loaded."""
    from dq_plugins.plan import Targets
    from dq_plugins.recipe.runner import passes_of

    passes_of(args.recipe, parse_options(args.option))
    acts = None if args.act_bits >= 32 else args.act_bits
    Targets(args.weight_bits, acts, args.edge_bits or 8, args.condition_bits)


def run_recipe(args: argparse.Namespace, denoiser: nn.Module, calibration: CalibrationSet, out: Path) -> QuantPlan:
    """Run the recipe that ``args`` name.

    Args:
        args: with what `add_recipe_arguments` declares, and ``seed``.
        denoiser: full precision.
        calibration: recorded from it.
        out: folder for the plan, see `make_plan`.
    """
    from dq_plugins.progress import on_terminal
    from dq_plugins.recipe import make_plan

    return make_plan(
        denoiser,
        calibration,
        args.recipe,
        weight_bits=args.weight_bits,
        act_bits=None if args.act_bits >= 32 else args.act_bits,
        edge_bits=args.edge_bits,
        condition_bits=args.condition_bits,
        symmetric_weights=args.symmetric_weights,
        symmetric_acts=args.symmetric_acts,
        weight_group_size=args.weight_group_size,
        seed=args.seed,
        options=parse_options(args.option),
        out=out,
        progress=on_terminal(),
    )


def parse_options(texts: list[str]) -> dict[str, dict[str, object]]:
    """``["timestep-groups.groups=4"]`` -> ``{"timestep-groups": {"groups": 4}}``; values are JSON, else text.

    Raises:
        RecipeError: a text has another form.
    """
    from dq_plugins.errors import RecipeError

    options: dict[str, dict[str, object]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        name, dot, field = key.partition(".")
        if not (equals and dot and name and field):
            raise RecipeError(f"--option takes PASS.NAME=VALUE, for example timestep-groups.groups=4; got {text!r}")
        try:
            options.setdefault(name, {})[field] = json.loads(value)
        except ValueError:
            options.setdefault(name, {})[field] = value
    return options
