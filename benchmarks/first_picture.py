"""Seconds from nothing to the first quantized picture, stage by stage, in a folder of its own that goes away again.

    python benchmarks/first_picture.py [--model digits] [--record]
    python benchmarks/first_picture.py --commit REVISION --extras dev --record first_picture-before

Needs nothing but Python and git: the checkout is cloned, an environment made, and everything installed as a user would.
What pip has in its cache is used unless ``--no-cache`` is given. The load of the machine stands beside the times.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results"

# each stage in the same process, as in a script of a user
STAGES = """
import json, sys, time
times, began = {}, (time.perf_counter(), time.process_time())

def done(stage):
    global began
    now = time.perf_counter(), time.process_time()
    times[stage], began = (now[0] - began[0], now[1] - began[1]), now

import dq_plugins as dq, dq_diffusers
from dq_diffusers.recording import denoiser_of, load_pipeline, sampler
done("import")
pipe = load_pipeline(dq.bundled(sys.argv[1]))
pipe.set_progress_bar_config(disable=True)
name, denoiser = denoiser_of(pipe)
done("load")
calib = dq.record(denoiser, sampler(pipe, steps=20, images=8), out="calib/", progress=False)
done("record")
plan = dq.make_plan(denoiser, calib, recipe=sys.argv[2], progress=False)
done("plan")
setattr(pipe, name, dq.apply(denoiser, plan, backend="torchao"))
done("prepare")
sampler(pipe, steps=20, images=1)(getattr(pipe, name))
done("first picture")
print("times", json.dumps(times))
"""


Times = tuple[float, float]
"""Seconds on the wall, and of CPU time, which depends little on what else runs."""


def used() -> float:
    """Seconds of CPU time of all commands so far."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def timed(what: str, *command: str, folder: Path | None = None) -> tuple[Times, str]:
    """What a command takes, and what it printed."""
    print(f"{what} ...", file=sys.stderr, flush=True)
    began, before = time.perf_counter(), used()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr[-3000:]}")
    return (time.perf_counter() - began, used() - before), done.stdout


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Times]:
    """Times of each stage, in order."""
    code, python = folder / "code", folder / "venv" / "bin" / "python"
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    install = (str(python), "-m", "pip", "install", "--quiet", *(["--no-cache-dir"] if args.no_cache else []))
    package = f"{code}[{args.extras}]"
    times = {"clone": timed("clone", "git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(code))[0]}
    subprocess.run(["git", "-C", str(code), "checkout", "--quiet", args.commit], check=True)
    times |= {
        "environment": timed("environment", sys.executable, "-m", "venv", str(folder / "venv"))[0],
        "install torch": timed("install torch", *install, torch)[0],
        "install the rest": timed("install the rest", *install, "--constraint", str(code / "constraints.txt"), package)[
            0
        ],
    }
    _, printed = timed("import to first picture", str(python), "-c", STAGES, args.model, args.recipe, folder=folder)
    stages = json.loads(re.findall(r"^times (.*)$", printed, re.MULTILINE)[-1])
    return {**times, **{stage: tuple(both) for stage, both in stages.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", choices=["digits", "emoji"])
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--no-cache", action="store_true", help="download everything again")
    parser.add_argument("--commit", default="HEAD", help="of the checkout, to compare with an earlier one")
    parser.add_argument("--extras", default="torchao,diffusers", help="what is installed")
    parser.add_argument("--record", nargs="?", const="first_picture", help="keep the result in benchmarks/results")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        times = measure(Path(folder), args)
    loads = (load, os.getloadavg()[0])
    print("| stage | seconds | CPU time, seconds |\n|---|---|---|")
    for stage, (seconds, cpu) in {**times, "all": tuple(map(sum, zip(*times.values(), strict=True)))}.items():
        print(f"| {stage} | {seconds:.1f} | {cpu:.1f} |")
    print(f"\nLoad before and after: {loads[0]:.1f}, {loads[1]:.1f}, on {os.cpu_count()} cores.")
    if args.record:
        commit = subprocess.check_output(
            ["git", "-C", str(ROOT), "rev-parse", "--short", args.commit], text=True
        ).strip()
        facts = {"model": args.model, "recipe": args.recipe, "commit": commit, "extras": args.extras}
        facts |= {"load": loads, "cores": os.cpu_count()}
        facts |= {name: {stage: both[i] for stage, both in times.items()} for i, name in enumerate(("seconds", "cpu"))}
        (RESULT / f"{args.record}.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
