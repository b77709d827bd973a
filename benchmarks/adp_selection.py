"""Drawing calibration images where timesteps are undecided, against the same number at every timestep.

    python -m benchmarks.adp_selection [--seeds 5] [--bits 4]

A pool of single images is recorded with the digits transformer. Every second timestep may be calibrated on, the others
are held out, and so are the images measured on. For growing numbers of calibration images: timestep groups by dynamic
program and ranges of least error, then the squared error of the quantized inputs of all layers at the held-out
timesteps, relative to their power, mean over layers.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from dq_diffusers.recording import denoiser_of, load_pipeline, sampler
from torch import nn

import dq_plugins as dq
from dq_plugins.bundled_denoisers import bundled
from dq_plugins.calibration import CalibrationSet
from dq_plugins.observers import optimal_groups
from dq_plugins.passes.ranges.search.active import ActiveCalibration
from dq_plugins.quantized.statistics import Statistics, collect

BUDGETS = (1.0, 2.0, 3.0, 3.6, 4.0, 6.0)  # images for each timestep, on average


def held_out_error(denoiser: nn.Module, drawn: CalibrationSet, held: Statistics, bits: int, groups: int) -> float:
    """Relative error of the layers' inputs at held-out timesteps with what was calibrated on the drawn calls."""
    found = collect(denoiser, drawn, held.layers)
    chosen = optimal_groups(found.error_tables(bits, symmetric=False), found.timesteps)
    of, ranges = chosen.groups(groups).of, chosen.ranges(groups)
    rows = torch.tensor([of(t) for t in held.timesteps])
    errors = []
    for layer, (low, high) in ranges.items():
        table = held.errors(layer, low, high, bits, symmetric=False)
        error = table.gather(1, rows[:, None]).mean()
        errors.append(float(error / held.mean_square(layer).mean()))
    return statistics.mean(errors)


def drawn_actively(denoiser: nn.Module, pool: CalibrationSet, args: argparse.Namespace, seed: int) -> list[float]:
    """Timesteps in the order in which images are drawn at them."""
    layers = [n for n, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    active = ActiveCalibration(
        denoiser,
        pool,
        dict.fromkeys(layers, args.bits),
        groups=args.groups,
        symmetric=False,
        generator=torch.Generator().manual_seed(seed),
    )
    limit = int(BUDGETS[-1] * len(pool.timesteps))
    return [pool.timesteps[index] for index, _ in active.draw(0.0, limit)]


def curves(
    pipe: object, denoiser: nn.Module, held: Statistics, args: argparse.Namespace, seed: int, folder: Path
) -> dict[str, dict[int, float]]:
    """Held-out error by number of images, for both ways to draw them."""
    # twice as many as an even draw would take: some timesteps are drawn more often than others
    images = 2 * int(BUDGETS[-1])
    sample = sampler(pipe, steps=args.steps, images=images, batch=1, seed=1000 * seed)
    whole = dq.record(denoiser, sample, folder / str(seed), progress=False)
    pool = whole.subset(whole.timesteps[::2])
    order = drawn_actively(denoiser, pool, args, seed)
    found: dict[str, dict[int, float]] = {"even": {}, "active": {}}
    for per_timestep in BUDGETS:
        count = int(per_timestep * len(pool.timesteps))
        share = [round(i * per_timestep) for i in range(len(pool.timesteps) + 1)]
        even = {t: share[i + 1] - share[i] for i, t in enumerate(pool.timesteps)}
        actively = {t: order[:count].count(t) for t in pool.timesteps}
        for name, visits in (("even", even), ("active", actively)):
            drawn = pool.subset(per_timestep=visits)
            found[name][count] = held_out_error(denoiser, drawn, held, args.bits, args.groups)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    pipe = load_pipeline(bundled("digits"))
    _, denoiser = denoiser_of(pipe)
    denoiser.eval().requires_grad_(False)
    layers = [n for n, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample = sampler(pipe, steps=args.steps, images=8, batch=8, seed=10_000)
        whole = dq.record(denoiser, sample, folder / "held", progress=False)
        held = collect(denoiser, whole.subset(whole.timesteps[1::2]), layers)
        print("| seed | images | even | active | active over even with all images |\n|---|---|---|---|---|")
        needed = []
        for seed in range(args.seeds):
            found = curves(pipe, denoiser, held, args, seed, folder)
            target = list(found["even"].values())[-1]
            for count, even in found["even"].items():
                active = found["active"][count]
                print(f"| {seed} | {count} | {even:.5f} | {active:.5f} | {active / target:.3f} |", flush=True)
            reached = [count for count, error in found["active"].items() if error <= target]
            evenly = [count for count, error in found["even"].items() if error <= target]
            needed.append((reached[0] if reached else None, evenly[0], max(found["even"])))
    print("\nimages to reach the error of the largest even draw (active, even, that draw):", needed)


if __name__ == "__main__":
    main()
