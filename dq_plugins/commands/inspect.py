"""``dq-plugins inspect``: what the layers of a denoiser depend on, from its config alone."""

from __future__ import annotations

import argparse
import json
from math import prod
from typing import Any

from dq_plugins.bundled_denoisers import folder_or_bundled
from dq_plugins.commands.arguments import positive

HELP = "Print the partition of a denoiser (what depends on timestep, conditions, sample) from its config alone."
EXAMPLE = """
dq-plugins inspect ./stable-diffusion-v1-5
dq-plugins inspect ./model/unet/config.json --json
"""

_UNITS = "kMGTPE"
_MEANING = {
    "temporal": "timestep alone",
    "condition": "conditions alone",
    "mixed": "timestep and conditions",
    "sample": "the noisy sample",
    "constant": "nothing",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        type=folder_or_bundled,
        help="a diffusers config.json, a model's folder, a pipeline's, or a bundled denoiser",
    )
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.add_argument("--layers", action="store_true", help="also list every layer")
    parser.add_argument("--timestep", metavar="NAME", help="the argument that carries the timestep, if not found")
    parser.add_argument("--sample", metavar="NAME", help="the argument that carries the noisy sample, if not found")
    parser.add_argument("--batch", type=positive, default=1, help="batch that MACs are counted for")
    parser.add_argument(
        "--size", type=positive, help="height and width of the latent sample (default: the config's, or 64)"
    )


def run(args: argparse.Namespace) -> int:
    """Build the denoiser without weights, trace it, and print its partition."""
    from dq_plugins.graph import partition, summarise
    from dq_plugins.libraries import adapter

    diffusers = adapter("diffusers")
    denoiser = diffusers.build_from_config(args.model)
    inputs = diffusers.example_inputs(denoiser, batch=args.batch, size=args.size)
    summary = summarise(partition(denoiser, inputs, timestep=args.timestep, sample=args.sample))
    if args.json:
        print(json.dumps({"denoiser": type(denoiser).__name__, **summary}, indent=1))
    else:
        print(render(type(denoiser).__name__, summary, list_layers=args.layers))
    return 0


def render(name: str, summary: dict[str, Any], list_layers: bool = False) -> str:
    """The summary of a partition as text.

    Args:
        name: of the denoiser.
        summary: as `dq_plugins.graph.summarise` returns it.
        list_layers: whether to list every layer.
    """
    total = summary["parameters"]
    inputs = ", ".join(f"{key} {row['shape']}" for key, row in summary["inputs"].items())
    lines = [
        f"{name}: {human(total)} parameters, {human(summary['macs']['total'])} MACs a call, "
        f"of which attention {human(summary['macs']['attention'])}",
        f"inputs: {inputs}",
        f"the timestep is {summary['timestep']!r}, the noisy sample is {summary['sample']!r}",
        "",
        f"{'depends on':<26}{'layers':>8}{'parameters':>12}{'':>8}{'MACs':>10}",
    ]
    for signature, row in summary["signatures"].items():
        share = f"{100 * row['parameters'] / max(total, 1):.1f} %"
        lines.append(
            f"{_MEANING[signature]:<26}{row['layers']:>8}"
            f"{human(row['parameters']):>12}{share:>8}{human(row['macs']):>10}"
        )
    lines += ["", "roles", *_role_lines(summary["roles"]), "", *_boundary_lines(summary["block_boundary"])]
    if list_layers:
        lines += ["", "layers", *(_layer_line(layer, row) for layer, row in summary["layers"].items())]
    return "\n".join(lines)


def _role_lines(roles: dict[str, list[str]]) -> list[str]:
    shown = 2
    return [
        f"  {role:<24}{len(layers):>5}  {', '.join(layers[:shown])}{', ...' if len(layers) > shown else ''}"
        for role, layers in roles.items()
    ]


def _boundary_lines(boundary: list[dict[str, Any]]) -> list[str]:
    lines = []
    for signature in ("temporal", "mixed"):
        rows = [row for row in boundary if row["signature"] == signature]
        if rows:
            values = sum(prod(row["shape"]) for row in rows)
            lines.append(
                f"{len(rows)} tensors of {human(values)} values carry what depends on {_MEANING[signature]} into the "
                f"rest, for example the output of {rows[0]['module'] or rows[0]['node']}"
            )
    return lines or ["the timestep reaches nothing"]


def _layer_line(name: str, row: dict[str, Any]) -> str:
    shape = "x".join(str(size) for size in row["weight_shape"])
    return f"  {name}  {row['kind']} {shape}  {human(row['macs'])} MACs  {' '.join([row['signature'], *row['roles']])}"


def human(count: int) -> str:
    """A count with three digits and a unit.

    Example:
        >>> human(859_520_964)
        '860 M'
    """
    if count < 1000:
        return str(count)
    power = 1
    while count >= 999.5 * 1000**power and power < len(_UNITS):
        power += 1
    value = count / 1000**power
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {_UNITS[power - 1]}"
