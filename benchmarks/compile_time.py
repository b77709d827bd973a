"""What the first call of a compiled denoiser costs, full precision and ours, with empty caches and in a second process.

    python -m benchmarks.compile_time --model dit

Every variant, in every way to compile it, runs in two processes of its own, one after the other, that share a folder of
inductor's caches which is empty at first. CPU seconds of the first call, of Python and of the C++ compiler that it
starts, on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch._inductor import config as inductor_config

from benchmarks.latency import COMPILE, MODES
from benchmarks.models import MODELS
from benchmarks.records import Records
from benchmarks.variants import VARIANTS

COMPARED = ("fp32", "W8A8, 8 groups, uniform t (ours)", "W8A8, 8 groups, attention (ours)")


def spent() -> dict[str, float]:
    """CPU seconds of this process and of those that it has started and waited for; wall-clock seconds."""
    times = os.times()
    return {
        "python": times.user + times.system,
        "compiler": times.children_user + times.children_system,
        "wall": time.perf_counter(),
    }


@torch.no_grad()
def first_call(model_name: str, variant: str, mode: str) -> dict[str, float]:
    """Build a variant, compile it, and call it once."""
    torch.set_num_threads(1)
    model = MODELS[model_name]()
    denoiser = VARIANTS[variant](model)
    inputs = model.inputs(500, 0)
    denoiser(**inputs)  # what is built or laid out at first use is no part of compiling
    with inductor_config.patch(compile_threads=1):
        compiled = COMPILE[mode](denoiser)
        before = spent()
        compiled(**inputs)
        return {name: value - before[name] for name, value in spent().items()}


def measured(model_name: str, variant: str, mode: str) -> list[dict[str, float]]:
    """Of two processes with one folder of caches."""
    command = [sys.executable, "-m", "benchmarks.compile_time", "--model", model_name, "--worker", variant, mode]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
        runs = [subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True) for _ in range(2)]
    return [json.loads(run.stdout.splitlines()[-1]) for run in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="dit")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=COMPARED)
    parser.add_argument("--compile", nargs="+", choices=[mode for mode in COMPILE if mode], default=["whole"])
    parser.add_argument("--worker", nargs=2, help="for the processes that this starts")
    parser.add_argument("--out", type=Path, help="folder of the record; default: benchmarks/results")
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(first_call(arguments.model, *arguments.worker)))
        return
    folder = {} if arguments.out is None else {"folder": arguments.out}
    records = Records(f"compile-time-{arguments.model}", {"model": arguments.model}, **folder)
    reference = 0.0
    for mode, variant in product(arguments.compile, arguments.only):
        name = f"{variant}, {MODES[mode]}"
        fresh, again = records.get(name, partial(measured, arguments.model, variant, mode))
        cpu = fresh["python"] + fresh["compiler"]
        reference = reference or cpu
        later = again["python"] + again["compiler"]
        print(f"{name}: {cpu:.1f} CPU s, {cpu / reference:.2f}x; second process {later:.1f} s, {later / cpu:.2f}x")


if __name__ == "__main__":
    main()
