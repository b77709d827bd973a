"""Timesteps and bits chosen together, on a bundled denoiser, against choosing one of them.

    python -m benchmarks.tmpq [--model digits | emoji] [--images 8] [--seeds 3] [--plot front.png] [--json FILE]
    python -m benchmarks.tmpq --part supernet            super-network against calibration from scratch

The reference is 100 DDIM steps in full precision, without ``clip_sample``: clipping the predicted image at every step
makes the result depend on the number of steps, so that few steps would not approach many (``--clip`` keeps it). Errors
are mean squared errors of the final samples (in [-1, 1]) from the same noise, on the images of the search and on as
many others. Quantizers and sensitivities come from a recording of 20 steps. Another seed is other images, other probes
and another search.

1. Half the steps, full precision: the chosen 10 timesteps against the scheduler's own 10, half of its own 20.
2. Equal total cost (steps x BitOps): the joint plan, (a) the scheduler's own timesteps with the best bits, (b) the best
   timesteps with uniform bits; each baseline with the best number of steps, and the best of three spacings.
3. Error against cost (first seed).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.tmpq_setup import COUNTS, NOTHING, STEPS, TARGET, Benchmark, Errors
from benchmarks.tmpq_supernet import supernet
from dq_plugins.bundled_denoisers import NAMES
from dq_plugins.passes.steps.baselines import draw, widest
from dq_plugins.passes.steps.joint import JointResult, JointSearch
from dq_plugins.passes.steps.joint_program import best_widths
from dq_plugins.passes.steps.space import Candidate
from dq_plugins.progress import finish
from dq_plugins.quantized.width import Width

Plans = list[tuple[tuple[float, ...], dict[str, Width]]]


def searched(bench: Benchmark, search: JointSearch) -> tuple[JointResult, dict[str, Any]]:
    """A result, and what it cost."""
    began = time.process_time()
    found = finish(search.run())
    assert found.solution is not None
    assert found.state is not None
    report = {
        "chosen by": found.chosen_by,
        "candidates": {who: each.candidate.key for who, each in found.scored.items()},
        "losses": {who: each.loss for who, each in found.scored.items()},
        "exact": found.solution.as_data(bench.setting.transitions),
        "evolution": found.state.summary(),
        "CPU seconds": time.process_time() - began,
    }
    bench.said(f"searched ({found.solution.status} program, {found.state.calls:.0f} image calls of the evolution)")
    return found, report


def half_the_steps(bench: Benchmark) -> dict[str, Any]:
    """Full precision: chosen against the scheduler's own timesteps."""
    search = bench.search(widths=False, steps=(STEPS,), budget=1.0)
    found, report = searched(bench, search)
    chosen = search.space.timesteps(found.best.candidate)
    rows = {"chosen": bench.errors(search.fitness, chosen, {})}
    for count in (STEPS, 2 * STEPS):
        rows |= {f"{name}, {count}": bench.errors(search.fitness, t, {}) for name, t in bench.own(count).items()}
    own = f"{bench.pipe.scheduler.config.timestep_spacing}, {STEPS}"
    print(f"1. {STEPS} steps in full precision {[int(t) for t in chosen]}; the scheduler's own: {own}")
    _print(rows, "chosen")
    return {"chosen": chosen, "own": own, "rows": rows, "search": report}


def equal_cost(bench: Benchmark) -> dict[str, Any]:
    """The joint plan against its two halves, at one budget."""
    search = bench.search()
    space = search.space
    found, report = searched(bench, search)
    rows = {
        who: bench.errors(search.fitness, space.timesteps(each.candidate), space.widths(each.candidate))
        for who, each in found.scored.items()
    }
    rows = {"joint": rows[found.chosen_by], **rows}
    rows["(a) own timesteps, best bits"] = _best_of(bench, search, _own_with(bench, search, best=True))
    rows["(b) best timesteps, uniform bits"] = _best_of(bench, search, _best_with_uniform(search))
    rows["own timesteps, uniform bits"] = _best_of(bench, search, _own_with(bench, search, best=False))
    print(f"2. at {space.budget:.4g} BitOps = {STEPS} steps of {TARGET}")
    _print(rows, "joint")
    steps = {who: len(each.candidate.steps) for who, each in found.scored.items()}
    return {"rows": rows, "steps": steps, "budget": space.budget, "search": report}


def _print(rows: Mapping[str, Errors], ours: str) -> None:
    print(f"   {'error to 100 steps':34} {'these':>8} {'others':>8} {'median':>8}   {ours} / this")
    for name, row in rows.items():
        ratios = " ".join(f"{mine / this:.2f}" for mine, this in zip(rows[ours], row, strict=True))
        print(f"   {name:34} {row.these:8.5f} {row.others:8.5f} {row.median:8.5f}   {ratios}", flush=True)


def _own_with(bench: Benchmark, search: JointSearch, *, best: bool) -> Plans:
    plans, space = [], search.space
    for count in COUNTS:
        genes = best_widths(space, search.noise, count) if best else widest(space, count, search.noise)
        if genes is not None:
            widths = space.widths(Candidate((0,) * count, genes))
            plans += [(timesteps, widths) for timesteps in bench.own(count).values()]
    return plans


def _best_with_uniform(search: JointSearch) -> Plans:
    """For each number of steps that fits: timesteps of the exact program, and the widest uniform widths."""
    plans, space = [], search.space
    for count in COUNTS:
        genes = widest(space, count, search.noise)
        if genes is None:
            continue
        widths = space.widths(Candidate((0,) * count, genes))
        choices = tuple(
            replace(
                layer,
                weights=(widths[layer.name].weight,),
                inputs=(widths[layer.name].activation,),
                cost=layer.cost[w : w + 1, a : a + 1],
            )
            for layer, w, a in zip(space.layers, genes[::2], genes[1::2], strict=True)
        )
        fixed = replace(space, intervals={count: space.intervals[count]}, layers=choices)
        limited = replace(search, fitness=replace(search.fitness, space=fixed))
        solution = limited.program().solve(seconds=search.options.seconds)
        if solution.candidate is not None:
            plans.append((fixed.timesteps(solution.candidate), widths))
    return plans


def _best_of(bench: Benchmark, search: JointSearch, plans: Plans) -> Errors:
    """Errors of the plan that is best on the images that judge, as the joint plan was chosen."""
    fitness = search.judge
    losses = [fitness.loss(fitness.final(*plan)) for plan in plans]
    if not losses:
        return NOTHING
    return bench.errors(search.fitness, *plans[losses.index(min(losses))])


def front(bench: Benchmark, plot: Path | None) -> dict[str, Any]:
    """Error against cost."""
    data = finish(bench.search().front((0.6, 0.8, 1.0, 1.4, 2.0)))
    bench.said("front searched")
    print("3. error against cost (BitOps: error, steps)")
    for name, each in data.items():
        print(f"   {name:28} " + ", ".join(f"{cost:.3g}: {loss:.5f} ({steps})" for cost, loss, steps in each))
    if plot:
        draw(data, "BitOps of a sampling run").savefig(plot, dpi=150)
    return data


def _summary(model: str, seeds: list[dict[str, Any]]) -> None:
    """Ratios of every seed, on other images: of means, and of medians."""
    for part, ours in (("half", "chosen"), ("equal cost", "joint")):
        print(f"{model}, {part}: {ours} / other, errors on other images, by seed: means | medians")
        for name in seeds[0][part]["rows"]:
            rows = [s[part]["rows"] for s in seeds if name in s[part]["rows"]]
            ratios = [[r[ours][i] / r[name][i] for r in rows] for i in (1, 2)]
            print(f"   {name:34} " + " | ".join(" ".join(f"{ratio:.2f}" for ratio in each) for each in ratios))


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMES, default="digits")
    parser.add_argument("--part", choices=("search", "supernet"), default="search")
    parser.add_argument("--images", type=int, default=8, help="images of the search, and as many others")
    parser.add_argument("--clip", action="store_true", help="keep the scheduler's clip_sample")
    parser.add_argument("--spacing", choices=("quadratic", "uniform", "change"), default="quadratic")
    parser.add_argument("--population", type=int, default=20)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--draws", type=int, default=160, help="backward passes of the sensitivity")
    parser.add_argument("--seconds", type=float, default=3.0, help="CP-SAT's time for each number of steps")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--no-front", action="store_true", help="leave out part 3")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(args).items()}, "seeds": []}
    with tempfile.TemporaryDirectory() as folder:
        if args.part == "supernet":
            supernet(args, Path(folder), report)
        for seed in range(args.seed, args.seed + args.seeds) if args.part == "search" else ():
            bench = Benchmark(args, Path(folder), seed)
            found = {"half": half_the_steps(bench), "equal cost": equal_cost(bench)}
            if seed == args.seed and not args.no_front:
                found["front"] = front(bench, args.plot)
            report["seeds"].append(found)
            _summary(args.model, report["seeds"])
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
