"""What planning costs on a U-Net of 63 M parameters, pass by pass, over the sampling that it observes.

    python -m benchmarks.planning --recipe default --weight-bits 8 [--images 8] [--steps 25]

The U-Net has the size and the form of a pixel-space DDPM (64 x 64), and random weights: cost does not depend on them.
Sampling is DDIM in batches of 4, recorded once, and planned from in the same process on one thread. All is CPU time of
the process, so other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

import dq_plugins as dq
from benchmarks.models import pixel_unet
from benchmarks.records import RESULTS, Records
from dq_plugins.recipe import runner


@contextmanager
def timed_passes() -> Iterator[dict[str, float]]:
    """CPU seconds of every pass that runs in the block, by name."""
    seconds: dict[str, float] = defaultdict(float)
    run = runner._run_pass

    def timed(instance: Any, *args: Any) -> None:
        start = time.process_time()
        run(instance, *args)
        seconds[instance.name] += time.process_time() - start
        print(instance.name, round(seconds[instance.name], 1), "CPU s", flush=True)

    with mock.patch.object(runner, "_run_pass", timed):
        yield seconds


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of recording, of each pass, and of the whole of planning."""
    from diffusers import DDIMPipeline, DDIMScheduler

    adapter = dq.get("adapter", "diffusers")()
    pipe = DDIMPipeline(pixel_unet(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    sampler = adapter.sampler(pipe, steps=args.steps, seed=0, images=args.images, batch=4)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        calib = dq.record(pipe.unet, sampler, folder, progress=False)
        recording = time.process_time() - start
        bits = {"weight_bits": args.weight_bits, "act_bits": args.act_bits}
        start = time.process_time()
        with timed_passes() as passes:
            dq.make_plan(pipe.unet, calib, args.recipe, progress=False, **bits)
        planning = time.process_time() - start
    over = {"planning": planning / recording, **{name: each / recording for name, each in passes.items()}}
    return {"recording": recording, "planning": planning, "passes": dict(passes), "over recording": over}


def main() -> None:
    """One recipe at one width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--weight-bits", type=int, default=8)
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {key: value for key, value in vars(args).items() if key in ("images", "steps")}
    records = Records("planning", settings, RESULTS)
    key = f"{args.recipe}, W{args.weight_bits}A{args.act_bits}"
    print(json.dumps({key: records.get(key, lambda: measure(args))}, indent=1))


if __name__ == "__main__":
    main()
