"""``dq-plugins gate``: pass or fail of a quantized run by its images, for continuous integration."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dq_plugins.commands.arguments import folder, model, positive

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dq_plugins.report import Table

HELP = "Sample with a quantized run and in full precision, compare the images, and fail where a limit is broken."
EXAMPLE = """
dq-plugins quantize digits --out run/
dq-plugins gate run/ --min-psnr 25 --max frechet=5       # exit status 0: passed, 1: a limit is broken
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", type=folder, help="folder that dq-plugins quantize wrote")
    parser.add_argument("--min-psnr", type=float, metavar="DB", help="the same as --min psnr=DB")
    parser.add_argument("--max-lpips", type=float, metavar="X", help="the same as --max lpips=X")
    for side, what in (("min", "least"), ("max", "largest")):
        parser.add_argument(
            f"--{side}",
            action="append",
            default=[],
            metavar="METRIC=VALUE",
            help=f"{what} value of a registered metric (dq-plugins list --kind metric), for the worst image; "
            "metrics of sets look at all images together; repeatable",
        )
    parser.add_argument("--images", type=positive, default=8, help="images to compare, other ones than for calibration")
    parser.add_argument(
        "--model", type=model, help="the full-precision pipeline, where it is no longer where the run found it"
    )
    parser.add_argument("--json", action="store_true", help="print {metric: {value, limit, passed}}")


def run(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from dq_plugins.errors import DQError
    from dq_plugins.gate import Limit, judge

    limits = [Limit.parse(text, side) for side in ("min", "max") for text in getattr(args, side)]
    limits += [Limit("psnr", "min", args.min_psnr)] if args.min_psnr is not None else []
    limits += [Limit("lpips", "max", args.max_lpips)] if args.max_lpips is not None else []
    if not limits:
        raise DQError("gate needs a limit: --min-psnr 35, --max-lpips 0.1, --min METRIC=VALUE or --max METRIC=VALUE")
    for limit in limits:
        limit.metric()  # before anything is sampled
    reference, output = _images(args)
    verdicts = [judge(limit, reference, output) for limit in limits]
    if args.json:
        print(json.dumps({v.metric: asdict(v) for v in verdicts}, indent=1))
    else:
        print(_table(verdicts))
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def _table(verdicts: list[Any]) -> Table:
    from dq_plugins.report import Table

    rows = [[v.metric, f"{v.value:.4g}", f"{v.side} {v.limit:g}", "passed" if v.passed else "FAILED"] for v in verdicts]
    return Table(["metric", "worst", "limit", ""], rows)


def _images(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Images of full precision and of the run, from the same noise: ``[N, C, H, W]`` each."""
    from pathlib import Path

    from dq_plugins.commands.record import sampler_of
    from dq_plugins.gate import as_images
    from dq_plugins.libraries import adapter
    from dq_plugins.run_record import RUN, RUN_NAME

    folder = Path(args.run_folder)
    run = RUN.read(folder / RUN_NAME)
    diffusers = adapter("diffusers")
    sampling = argparse.Namespace(**run.sampling)
    sampling.model, sampling.component = args.model or run.model, None
    sampling.seed, sampling.images = sampling.seed + sampling.images, args.images  # none that was calibrated on
    pipe = diffusers.load_pipeline(sampling.model)
    found = []
    for each in (pipe, _quantized(folder, run, diffusers, sampling.model)):
        sample = sampler_of(sampling, each, final=True)
        found.append(as_images(sample(diffusers.denoiser_of(each)[1])))
    return found[0], found[1]


def _quantized(folder: Any, run: Any, diffusers: Any, model: str) -> Any:
    """The run's pipeline; where its backend wrote none, the plans applied to the full-precision one."""
    from dq_plugins.application import apply

    if (folder / "pipeline").is_dir():
        return diffusers.load_pipeline(folder / "pipeline")
    pipe = diffusers.load_pipeline(model)
    for name in run.components:
        denoiser: nn.Module = diffusers.denoisers_of(pipe)[name].eval().requires_grad_(False)
        place = folder / name if len(run.components) > 1 else folder
        apply(denoiser, place / "plan", run.backend, inplace=True)
    return pipe
