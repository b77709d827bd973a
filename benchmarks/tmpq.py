"""Timesteps and bits chosen together, on a bundled denoiser, against choosing one of them.

    python -m benchmarks.tmpq [--model digits | emoji] [--images 8] [--generations 8] [--plot front.png] [--json FILE]
    python -m benchmarks.tmpq --part supernet            super-network against calibration from scratch

The reference is 100 DDIM steps in full precision, without ``clip_sample``: clipping the predicted image at every step
makes the result depend on the number of steps, so that few steps would not approach many (``--clip`` keeps it). Errors
are mean squared errors of the final samples (in [-1, 1]) from the same noise, on the images of the search and on as
many others. Quantizers and sensitivities come from a recording of 20 steps.

1. Half the steps, full precision: the chosen 10 timesteps against the scheduler's own 10, half of its own 20.
2. Equal total cost (steps x BitOps): the joint plan, (a) the scheduler's own timesteps with the best bits, (b) the best
   timesteps with uniform bits; each baseline with the best number of steps, and the best of three spacings.
3. Error against cost.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from dq_diffusers.recording import denoiser_of, load_pipeline, sampler

import dq_plugins as dq
from dq_plugins.allocation.problem import Width
from dq_plugins.bundled import NAMES, bundled
from dq_plugins.evolution import Candidate, Space
from dq_plugins.evolution.baselines import widest
from dq_plugins.evolution.exact import best_widths
from dq_plugins.evolution.figure import draw
from dq_plugins.evolution.fitness import SamplingFitness
from dq_plugins.passes.candidates import candidates_of
from dq_plugins.passes.timestep_reduction import Setting, TimestepReduction
from dq_plugins.recipe import PassContext, Recipe, Step
from dq_plugins.sensitivity.measure import finish
from dq_plugins.steps import runs_of

MENUS = {"weight_menu": (3, 4, 5, 6, 8), "act_menu": (4, 6, 8)}
TARGET, STEPS, COUNTS = Width(4, 6), 10, (10, 8, 13)
SPACINGS = ("trailing", "leading", "linspace")
RANGES = (Step("weight-ranges"), Step("timestep-groups"), Step("activation-ranges"))


def record(
    args: argparse.Namespace, folder: Path, seed: int, steps: int = 100
) -> tuple[Any, torch.nn.Module, dq.CalibrationSet]:
    """A recording of full-precision sampling."""
    pipe = load_pipeline(bundled(args.model))
    _, denoiser = denoiser_of(pipe)
    denoiser.eval().requires_grad_(False)
    if not args.clip:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=False)
    prompts = None
    if args.model == "emoji":
        lines = [p for p in (bundled("emoji") / "prompts.txt").read_text().split("\n") if p]
        prompts = [lines[(seed + i) % len(lines)] for i in range(args.images)]
    run = sampler(pipe, prompts=prompts, steps=steps, images=args.images, batch=args.images, seed=seed)
    return pipe, denoiser, dq.record(denoiser, run, out=folder / f"calibration-{seed}-{steps}", progress=False)


def sensitivity(args: argparse.Namespace, denoiser: torch.nn.Module, calibration: dq.CalibrationSet) -> dq.QuantPlan:
    """A plan with ranges and sensitivities."""
    options = {**MENUS, "calls_per_timestep": 1, "draws": args.draws, "check_entries": 12}
    recipe = Recipe("measured", "", (*RANGES, Step("sensitivity", options)))
    return dq.make_plan(denoiser, calibration, recipe, progress=False)


class Benchmark:
    """A measured denoiser, and errors of any schedule with any widths."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.pipe, self.denoiser, self.calibration = record(args, folder, 0)
        held = record(args, folder, 1000)[2]
        short = record(args, folder, 0, steps=20)[2]
        self.plan = sensitivity(args, self.denoiser, short)
        self.context = PassContext(
            self.denoiser, self.calibration, TARGET.weight or 8, TARGET.activation, args.seed, folder / "work"
        )
        quantizers = candidates_of(self.plan, PassContext(self.denoiser, short), *MENUS.values())
        self.context.shared(("candidates", *MENUS.values()), lambda: quantizers)  # what the pass will ask for
        self._said("recorded, ranges and sensitivities measured")
        self.search = TimestepReduction(
            steps=COUNTS, grid=50, seconds=args.seconds, images=(0.25, 1.0), **_evolution(args)
        )
        self.setting: Setting = finish(self.search._setting(self.plan, self.context))
        self._said("costs of steps measured")
        self.held_out = runs_of(held, self.context.partition.sample_argument)[1]

    def _said(self, what: str) -> None:
        print(f"{time.process_time():7.0f} CPU s  {what}", flush=True)

    def space(self, **options: Any) -> Space:
        """The space of the search, with other options."""
        search = TimestepReduction(**{**self.search.options.model_dump(), **options})
        return search.space(self.plan, self.context, self.setting)

    def fitness(self, space: Space, held_out: bool = False) -> SamplingFitness:
        """Errors on the images of the search, or on others."""
        found = self.search._fitness(self.context, self.setting, space)
        return replace(found, runs=self.held_out, images=(self.args.images,)) if held_out else found

    def errors(self, space: Space, timesteps: Sequence[float], widths: Mapping[str, Width]) -> tuple[float, float]:
        """Mean squared error on the images of the search and on others."""
        pair = (self.fitness(space), self.fitness(space, held_out=True))
        first, second = (f.loss(f.final(tuple(timesteps), dict(widths))) for f in pair)
        return first, second

    def own(self, count: int) -> dict[str, tuple[float, ...]]:
        """Timesteps of the scheduler's spacings, the ranges of the quantizers permitting."""
        found = {}
        low, high = self.calibration.timestep_range
        for spacing in SPACINGS:
            scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config, timestep_spacing=spacing)
            scheduler.set_timesteps(count)
            timesteps = tuple(float(t) for t in scheduler.timesteps)
            if low <= timesteps[-1] and timesteps[0] <= high:
                found[spacing] = timesteps
        return found


def _evolution(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "generations": args.generations,
        "population": args.population,
        "parents": max(args.population // 5, 1),
        "mutants": args.population // 2,
        "crossovers": args.population // 5,
    }


def searched(bench: Benchmark, space: Space) -> dict[str, Any]:
    """The exact plan and the evolved one, with what each cost."""
    fitness = bench.fitness(space)
    began = time.perf_counter()
    program = bench.search.program(bench.setting, space, fitness)
    solution = program.solve(seconds=bench.args.seconds)
    solved = time.perf_counter() - began
    began = time.perf_counter()
    state = finish(bench.search._evolve(bench.context, bench.setting, space, fitness, solution))
    assert solution.candidate is not None
    assert state is not None
    assert bench.setting.transitions is not None
    last = fitness.rungs - 1
    return {
        "exact": solution.candidate,
        "evolution": state.best.candidate,
        "exact_loss": fitness(solution.candidate, last)["loss"],
        "evolution_loss": state.best.loss,
        "status": solution.status,
        "exact_seconds": solved,
        "exact_calls": bench.setting.transitions.calls,
        "evolution_seconds": time.perf_counter() - began,
        "evolution_calls": state.calls,
        "evaluations": state.evaluations,
        "history": state.history,
    }


def better(found: Mapping[str, Any]) -> Candidate:
    """What the pass would write."""
    return found["evolution"] if found["evolution_loss"] < found["exact_loss"] else found["exact"]


def half_the_steps(bench: Benchmark, report: dict[str, Any]) -> None:
    """Full precision: chosen against the scheduler's own timesteps."""
    alone = replace(bench.setting, noise={}, candidates=replace(bench.setting.candidates, weights={}, activations={}))
    bench.setting, kept = alone, bench.setting
    space = bench.space(steps=(STEPS,), budget=1.0)
    bench.context.workdir = bench.context.workdir.parent / "half" if bench.context.workdir else None
    found = searched(bench, space)
    chosen = space.timesteps(better(found))
    mine = bench.errors(space, chosen, {})
    own = {name: bench.errors(space, t, {}) for name, t in bench.own(STEPS).items()}
    double = {name: bench.errors(space, t, {}) for name, t in bench.own(2 * STEPS).items()}
    bench.setting = kept
    default = bench.pipe.scheduler.config.timestep_spacing
    report["half"] = {"chosen": chosen, "error": mine, "own": own, "twice the steps": double, "search": _plain(found)}
    print(f"\n1. {STEPS} steps in full precision: error to 100 steps (search images, others)")
    print(f"   chosen {[int(t) for t in chosen]}: {mine[0]:.5f}, {mine[1]:.5f}")
    for name, (here, there) in own.items():
        star = " (its own)" if name == default else ""
        print(f"   {name}{star}: {here:.5f}, {there:.5f}; ratio {mine[0] / here:.2f}, {mine[1] / there:.2f}")
    for name, (here, there) in double.items():
        print(f"   {name} with {2 * STEPS} steps: {here:.5f}, {there:.5f}")


def equal_cost(bench: Benchmark, report: dict[str, Any]) -> None:
    """The joint plan against its two halves, at one budget."""
    space = bench.space()
    bench.context.workdir = bench.context.workdir.parent / "joint" if bench.context.workdir else None
    found = searched(bench, space)
    rows = {
        name: bench.errors(space, space.timesteps(found[name]), space.widths(found[name]))
        for name in ("exact", "evolution")
    }
    rows["joint"] = rows["evolution" if better(found) is found["evolution"] else "exact"]
    rows["(a) own timesteps, best bits"] = _best_of(bench, space, _own_with(bench, space, best=True))
    rows["(b) best timesteps, uniform bits"] = _best_of(bench, space, _best_with_uniform(bench, space))
    rows["own timesteps, uniform bits"] = _best_of(bench, space, _own_with(bench, space, best=False))
    joint = rows["joint"]
    report["equal cost"] = {"rows": rows, "search": _plain(found), "budget": space.budget}
    print(f"\n2. at {space.budget:.4g} BitOps = {STEPS} steps of {TARGET}: error to 100 steps (here, others)")
    for name, (here, there) in rows.items():
        print(f"   {name:34} {here:.5f}, {there:.5f}; joint / this {joint[0] / here:.2f}, {joint[1] / there:.2f}")
    for name in ("exact", "evolution"):
        steps = len(found[name].steps)
        calls, seconds = found[f"{name}_calls"], found[f"{name}_seconds"]
        print(f"   {name}: {steps} steps, cost {space.cost(found[name]):.4g}, {calls:.0f} image calls, {seconds:.0f} s")
    print(f"   exact program: {found['status']}; evolution scored {found['evaluations']} candidates on its rungs")


Plans = list[tuple[tuple[float, ...], dict[str, Width]]]


def _own_with(bench: Benchmark, space: Space, *, best: bool) -> Plans:
    plans = []
    for count in COUNTS:
        genes = best_widths(space, bench.setting.noise, count) if best else widest(space, count)
        if genes is not None:
            widths = space.widths(Candidate((0,) * count, genes))
            plans += [(timesteps, widths) for timesteps in bench.own(count).values()]
    return plans


def _best_with_uniform(bench: Benchmark, space: Space) -> Plans:
    """For each number of steps that fits, the program's timesteps with the widest uniform widths."""
    plans = []
    for count in COUNTS:
        genes = widest(space, count)
        if genes is None:
            continue
        widths = space.widths(Candidate((0,) * count, genes))
        menus = tuple(
            replace(
                layer,
                weights=(widths[layer.name].weight,),
                inputs=(widths[layer.name].activation,),
                cost=layer.cost[w : w + 1, a : a + 1],
            )
            for layer, w, a in zip(space.layers, genes[::2], genes[1::2], strict=True)
        )
        fixed = Space({count: space.groups[count]}, menus, space.budget, space.unit)
        solution = bench.search.program(bench.setting, fixed, bench.fitness(fixed)).solve(seconds=bench.args.seconds)
        if solution.candidate is not None:
            plans.append((fixed.timesteps(solution.candidate), widths))
    return plans


def _best_of(bench: Benchmark, space: Space, plans: Plans) -> tuple[float, float]:
    """Errors of the plan that is best on the images of the search, as the joint plan was chosen."""
    fitness = bench.fitness(space)
    losses = [fitness.loss(fitness.final(*plan)) for plan in plans]
    if not losses:
        return float("nan"), float("nan")
    best = plans[losses.index(min(losses))]
    return bench.errors(space, *best)


def _plain(found: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.key if isinstance(v, Candidate) else v for k, v in found.items()}


def front(bench: Benchmark, report: dict[str, Any], plot: Path | None) -> None:
    """Error against cost."""
    space = bench.space()
    swept = TimestepReduction(**{**bench.search.options.model_dump(), "sweep": (0.7, 1.0, 1.5)})
    points = swept._points(bench.setting, space, bench.fitness(space))
    report["front"] = {name: [[p.cost, p.loss, len(p.timesteps)] for p in each] for name, each in points.items()}
    print("\n3. error against cost (BitOps: error, steps)")
    for name, each in points.items():
        print(f"   {name:28} " + ", ".join(f"{p.cost:.3g}: {p.loss:.5f} ({len(p.timesteps)})" for p in each))
    if plot:
        draw(report["front"], "BitOps of a sampling run").savefig(plot, dpi=150)


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMES, default="digits")
    parser.add_argument("--part", choices=("search", "supernet"), default="search")
    parser.add_argument("--images", type=int, default=4, help="images of the search, and as many others")
    parser.add_argument("--clip", action="store_true", help="keep the scheduler's clip_sample")
    parser.add_argument("--population", type=int, default=20)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--draws", type=int, default=160, help="backward passes of the sensitivity")
    parser.add_argument("--seconds", type=float, default=3.0, help="CP-SAT's time for each number of steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-front", action="store_true", help="leave out part 3")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(args).items()}}
    with tempfile.TemporaryDirectory() as folder:
        if args.part == "supernet":
            from benchmarks.tmpq_supernet import supernet

            supernet(args, Path(folder), report)
        else:
            bench = Benchmark(args, Path(folder))
            half_the_steps(bench, report)
            equal_cost(bench, report)
            if not args.no_front:
                front(bench, report, args.plot)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
