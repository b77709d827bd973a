"""``dq-plugins export``: a plan's weights in a file that another program reads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dq_plugins.commands.arguments import MODEL_HELP, model, plan_folder

HELP = "Write a denoiser with a plan's widths and rounding as the int8 safetensors file that ComfyUI reads."
EXAMPLE = "dq-plugins export digits plan/ --out digits-int8.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=model, help=MODEL_HELP)
    parser.add_argument("plan", type=plan_folder, help="folder of a plan")
    parser.add_argument("--out", required=True, metavar="FILE", help="the file")
    parser.add_argument("--prefix", default="", help="of every key, for example model.diffusion_model.")
    parser.add_argument("--component", metavar="NAME", help="the denoiser, where the pipeline has several")
    parser.add_argument("--json", action="store_true", help="print the counts, and {layer: reason} for floating point")


def run(args: argparse.Namespace) -> int:
    from dq_plugins.comfy import write_comfy
    from dq_plugins.libraries import load_denoiser
    from dq_plugins.plan import QuantPlan
    from dq_plugins.report import Table

    _, denoiser = load_denoiser(args.model, args.component)
    plan = QuantPlan.load(args.plan)
    left = write_comfy(denoiser, plan, Path(args.out), prefix=args.prefix)
    rounded = [name for name, layer in plan.layers.items() if layer.weight is not None]
    if args.json:
        print(json.dumps({"file": args.out, "int8": len(rounded) - len(left), "floating_point": left}, indent=1))
        return 0
    print(f"{args.out}: {len(rounded) - len(left)} layers in int8, {len(left)} rounded and in floating point")
    if left:
        print(Table(["layer", "why in floating point"], [list(each) for each in left.items()]))
    return 0
