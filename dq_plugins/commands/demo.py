"""``dq-plugins demo``: the main job on a bundled denoiser, with a report."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from dq_plugins.bundled_denoisers import NAMES
from dq_plugins.commands.arguments import positive, registered

HELP = "Quantize a bundled denoiser to W8A8 through torchao and write a report with pictures, errors, size and speed."
EXAMPLE = "dq-plugins demo --out demo-report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        default="demo-report",
        help="folder of demos; each has a folder of its own in it, named by its settings",
    )
    parser.add_argument("--model", default="emoji", choices=NAMES, help="bundled denoiser")
    parser.add_argument("--recipe", type=registered("recipe"), default="default", help="registered recipe")
    parser.add_argument("--weight-bits", type=positive, default=8, help="width of weights")
    parser.add_argument("--act-bits", type=positive, default=8, help="width of activations")
    parser.add_argument("--groups", type=positive, default=8, help="timestep groups")
    parser.add_argument("--no-compile", action="store_true", help="skip the compiled denoisers: most of the time")
    parser.add_argument("--threads", type=positive, help="of PyTorch (default: one, or all, what is faster here)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calibration images")
    parser.add_argument("--open", action="store_true", help="show the report in the browser")
    parser.add_argument("--json", action="store_true", help="print the figures and the file's name as one JSON object")


def run(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from dq_plugins.atomic import replacing
    from dq_plugins.demo import best_threads, expected_seconds, run_demo
    from dq_plugins.plots import pairs_of_images
    from dq_plugins.progress import on_terminal
    from dq_plugins.report.demo_page import demo_page, summary_table
    from dq_plugins.report.execution import execution_table
    from dq_plugins.stages import Stages

    name = f"{args.model}-W{args.weight_bits}A{args.act_bits}-{args.recipe}-{args.groups}-groups-seed-{args.seed}"
    out = Path(args.out) / name
    file = sys.stderr if args.json else sys.stdout

    def say(line: str) -> None:
        tqdm.write(line, file)  # leaves the progress bar of a pass whole
        file.flush()

    if args.threads is None:
        say("trying whether one thread or all of them are faster here")
    torch.set_num_threads(args.threads or best_threads(args.model))
    stages = Stages(expected_seconds(args.model, args.recipe, compiled=not args.no_compile), say=say)
    with stages.heard(), nullcontext() if on_terminal() else passes_told(say):
        result = run_demo(
            out,
            args.model,
            recipe=args.recipe,
            weight_bits=args.weight_bits,
            act_bits=args.act_bits,
            groups=args.groups,
            compiled=not args.no_compile,
            seed=args.seed,
            say=stages,
        )
    page = demo_page(result).save(out / "report.html")
    with replacing(out / "images.png") as temporary:
        pairs_of_images(result.images, result.titles).savefig(temporary, dpi=150)
    if args.json:
        print(json.dumps({"report": str(page), **dict(summary_table(result).rows)}, indent=1))
    else:
        print(f"\n{summary_table(result)}\n\n{execution_table(result.executions)}\n\n{next_steps(page, out)}")
    if args.open:
        webbrowser.open(page.absolute().as_uri())
    return 0


@contextmanager
def passes_told(say: Callable[[str], object]) -> Iterator[None]:
    """While the block runs, each pass that has ended is told: for a log, where no progress bar shows it."""
    runner, handler = logging.getLogger("dq_plugins.recipe.runner"), logging.Handler()
    handler.emit = lambda record: say(f"           {record.getMessage()}")  # type: ignore[method-assign]
    level = runner.level
    runner.setLevel(logging.INFO)
    runner.addHandler(handler)
    try:
        yield
    finally:
        runner.removeHandler(handler)
        runner.setLevel(level)


def next_steps(page: Path, out: Path) -> str:
    """Which file to look at, and what to type next."""
    # `make demo` has the program in an environment that is not on the path
    started = sys.argv[0] if Path(sys.argv[0]).name == "dq-plugins" else "dq-plugins"
    program = "dq-plugins" if shutil.which("dq-plugins") else started
    steps = {
        "quantize PIPELINE --out quantized/": "the same for a diffusers pipeline of yours, saved for from_pretrained",
        f"demo --weight-bits 4 --out {out.parent}": "the same with 4-bit weights",
        "recipes": "what the recipe did, and what others there are",
        f"diff {out / 'plan'} OTHER": "this plan beside another",
    }
    lines = [f"  # {what}\n  {program} {command}" for command, what in steps.items()]
    return "\n".join([f"Open {page} in a browser: pictures, errors, speed, every layer.", "", "Next:", *lines])
