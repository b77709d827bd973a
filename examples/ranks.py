"""Record and plan over the processes of torchrun: `torchrun --nproc-per-node 4 examples/ranks.py PIPELINE OUT`.

Rank 0 runs the recipe, and the others compute what it shares: batches of images, timesteps of statistics, layers of a
sensitivity, candidates of a search. The plan is that of one process, byte for byte. With ``--nnodes`` the ranks may be
on several machines; ``OUT`` has to be on a file system that all of them see.
"""

import argparse
from pathlib import Path

import dq_diffusers
from dq_diffusers.recording import denoiser_of, sampler

import dq_plugins
from dq_plugins.workers import over_ranks


def plan_into(args: argparse.Namespace) -> dq_plugins.QuantPlan:
    pipe = dq_diffusers.load_pipeline(args.pipeline)
    _, denoiser = denoiser_of(pipe)
    draw = sampler(pipe, steps=args.steps, images=args.images, batch=2)
    calibration = dq_plugins.record(denoiser, draw, args.out / "calib")
    plan = dq_plugins.make_plan(denoiser, calibration, args.recipe, workdir=args.out / "work")
    plan.save(args.out / "plan")
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", help="folder of a diffusers pipeline")
    parser.add_argument("out", type=Path, help="folder for the recording and the plan")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=16)
    args = parser.parse_args()
    plan = over_ranks(lambda: plan_into(args))
    print(f"plan {plan.hash[:12]}")  # every rank has it


if __name__ == "__main__":
    main()
