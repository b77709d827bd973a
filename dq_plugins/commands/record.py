"""``dq-plugins record``: a calibration set from full-precision sampling of a saved pipeline."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq_plugins.commands.arguments import MODEL_HELP, model, positive
from dq_plugins.commands.plan import add_worker_argument

if TYPE_CHECKING:
    from torch import nn

    from dq_plugins.calibration import CalibrationSet

HELP = "Record the denoiser calls of full-precision sampling into a calibration set. Run it again to resume."
EXAMPLE = """
dq-plugins record ./my-pipeline --out calib/ --steps 20 --images 16 --prompts prompts.txt
dq-plugins record ./my-dit --out calib/ --classes 0 1 2 3
"""


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every command that records."""
    parser.add_argument("--steps", type=positive, default=20, help="denoising steps")
    parser.add_argument("--images", type=positive, default=8, help="images to sample")
    parser.add_argument("--batch", type=positive, default=8, help="images sampled at once")
    parser.add_argument(
        "--prompts",
        nargs="+",
        metavar="TEXT",
        help="prompts, or one text file with a prompt on each line (default: prompts.txt in the model's folder, "
        "else a small built-in list)",
    )
    parser.add_argument("--classes", nargs="+", type=int, metavar="N", help="class labels (default: all in turn)")
    parser.add_argument("--guidance-scale", type=float, help="classifier-free guidance (default: the pipeline's)")
    parser.add_argument(
        "--call",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another argument of the pipeline's call, for example strength=0.6 or image=start.png; repeatable",
    )
    parser.add_argument("--component", metavar="NAME", help="the denoiser, where the pipeline has several")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image")
    parser.add_argument("--timestep", metavar="NAME", help="the argument that carries the timestep, if not found")
    parser.add_argument("--overwrite", action="store_true", help="start over where a calibration set lies already")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=model, help=MODEL_HELP)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the calibration set")
    add_sampling_arguments(parser)
    add_worker_argument(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON summary")


def record_pipeline(
    args: argparse.Namespace, pipe: Any, denoiser: nn.Module, out: Path, *, progress: bool = True
) -> CalibrationSet:
    """Sample a pipeline as ``args`` say, and record the calls of its denoiser into ``out``."""
    from dq_plugins.calibration import record
    from dq_plugins.progress import on_terminal

    return record(
        denoiser,
        sampler_of(args, pipe),
        out,
        timestep=args.timestep,
        overwrite=args.overwrite,
        progress=progress and on_terminal(),
    )


def sampler_of(args: argparse.Namespace, pipe: Any, *, final: bool = False) -> Any:
    """The sampler that ``args`` describe; with ``final`` its images are decoded to arrays."""
    from dq_plugins.libraries import adapter

    default = Path(args.model) / "prompts.txt"
    prompts = args.prompts or ([str(default)] if default.is_file() else None)
    decoded = {"output_type": "np"} if final else {}
    return adapter("diffusers").sampler(
        pipe,
        prompts=read_prompts(prompts) if prompts else None,
        class_labels=args.classes,
        steps=args.steps,
        seed=args.seed,
        images=args.images,
        batch=args.batch,
        guidance_scale=args.guidance_scale,
        component=args.component,
        **(decoded | read_call(args.call)),
    )


def run(args: argparse.Namespace) -> int:
    from dq_plugins.libraries import load_denoiser
    from dq_plugins.workers import workers

    pipe, denoiser = load_denoiser(args.model, args.component)
    with workers(args.workers):
        calib = record_pipeline(args, pipe, denoiser, Path(args.out), progress=not args.json)
    summary = {
        "folder": str(args.out),
        "model": calib.model,
        "calls": len(calib),
        "timesteps": len(calib.timesteps),
        "schedule": list(calib.schedule.timesteps),
        "bytes": sum(path.stat().st_size for path in Path(args.out).iterdir()),
        "hash": calib.hash,
    }
    if args.json:
        print(json.dumps(summary, indent=1))
    else:
        print(
            f"{args.out}: {summary['calls']} calls of {calib.model} at {summary['timesteps']} timesteps "
            f"({calib.timesteps[0]:g} to {calib.timesteps[-1]:g}), {summary['bytes'] / 1e6:.1f} MB, "
            f"hash {calib.hash[:12]}"
        )
    return 0


def read_prompts(given: list[str]) -> list[str]:
    """Prompts from the command line: the texts themselves, or the lines of one text file.

    Raises:
        DQError: the file holds no prompt.
    """
    from dq_plugins.errors import DQError

    if len(given) > 1 or not Path(given[0]).is_file():
        return given
    prompts = [line.strip() for line in Path(given[0]).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise DQError(f"{given[0]} holds no prompts; write one on each line")
    return prompts


def read_call(texts: list[str]) -> dict[str, Any]:
    """``["strength=0.6"]`` -> ``{"strength": 0.6}``: values are JSON, the name of an image file, else text.

    Raises:
        DQError: a text has another form.
    """
    from dq_plugins.errors import DQError

    arguments: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise DQError(f"--call takes NAME=VALUE, for example strength=0.6; got {text!r}")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = _image(value) if Path(value).is_file() else value
    return arguments


def _image(file: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    from dq_plugins.errors import DQError

    try:
        return Image.open(file).convert("RGB")
    except UnidentifiedImageError as error:
        raise DQError(f"--call: {file} is not an image that can be read") from error
