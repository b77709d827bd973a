"""Record and plan with several processes of joblib: `python examples/workers.py PIPELINE OUT --workers 4`.

The plan is that of one process, byte for byte. Inside ``with joblib.parallel_config("ray")`` (after
``ray.util.joblib.register_ray()``), or ``"dask"``, the processes may be on other machines; ``OUT`` has to be on a file
system that all of them see.
"""

import argparse
from pathlib import Path

import dq_diffusers
from dq_diffusers.recording import denoiser_of, sampler

import dq_plugins
from dq_plugins.workers import workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", help="folder of a diffusers pipeline")
    parser.add_argument("out", type=Path, help="folder for the recording and the plan")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=16)
    args = parser.parse_args()

    pipe = dq_diffusers.load_pipeline(args.pipeline)
    _, denoiser = denoiser_of(pipe)
    draw = sampler(pipe, steps=args.steps, images=args.images, batch=2)
    with workers(args.workers):
        calibration = dq_plugins.record(denoiser, draw, args.out / "calib")
        plan = dq_plugins.make_plan(denoiser, calibration, args.recipe, workdir=args.out / "work")
    plan.save(args.out / "plan")
    print(f"{len(calibration)} calls recorded, plan {plan.hash[:12]}")


if __name__ == "__main__":
    main()
