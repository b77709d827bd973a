"""Time to proven optimality of bit allocation: the registered solvers, and the other ones that OR-Tools ships.

    python -m benchmarks.solvers [--layers 300] [--programs 3] [--tolerance 0] [--limit 40]

A program looks like a network: log-normal parameters, MACs and sensitivities, noise that falls as 4^-bits, 6 widths,
and three budgets together: weight bits, BitOps, and a latency table that no formula gives. The limits are up to 3 %
below what the best plan for a random mix of the three takes, so that all of them bind and no plan meets them exactly
(solvers that allow a budget to be exceeded by 1e-6 would gain from that). Every solver gets the same programs,
tolerance and time, in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.records import Records
from dq_plugins.solvers import Budget, ChoiceProgram, Solution
from dq_plugins.solvers.cp_sat import cp_sat
from dq_plugins.solvers.linear_program import LinearModel
from dq_plugins.solvers.mip import mip
from dq_plugins.solvers.quick import greedy, threshold

WIDTHS = np.array([2, 3, 4, 6, 8, 16])


class Answer(NamedTuple):
    """What a solver reached: objective (None: no plan), whether it says the gap is closed, wall and CPU seconds."""

    objective: float | None
    proven: bool
    seconds: float
    cpu_seconds: float


class Clock:
    """Wall time, and CPU time of this process and the programs it starts; the latter says more on a busy machine."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), self._cpu()

    @staticmethod
    def _cpu() -> float:
        return sum(os.times()[:4])

    def read(self) -> tuple[float, float]:
        """Seconds since the start."""
        return time.perf_counter() - self._began[0], self._cpu() - self._began[1]


Solve = Callable[[ChoiceProgram, float, float], Answer]


def network_program(layers: int, seed: int) -> ChoiceProgram:
    """A program as the top of this file says."""
    rng = np.random.default_rng(seed)
    params = np.exp(rng.normal(11, 1.5, layers)).round()[:, None]
    macs = (params * np.exp(rng.normal(4, 1.5, (layers, 1)))).round()
    error = np.exp(rng.normal(0, 2, (layers, 1))) * 4.0**-WIDTHS * np.exp(rng.normal(0, 0.2, (layers, 6)))
    speed = 1e-9 * (1 + np.maximum(WIDTHS, 4) / 8) * np.exp(rng.normal(0, 0.1, (layers, 6)))
    tables = {"weight bits": params * WIDTHS, "BitOps": macs * WIDTHS * 8, "latency": macs * speed}
    mix = sum(w * t / t.mean() for w, t in zip(rng.dirichlet(np.ones(3)), tables.values(), strict=True))
    chosen = (error / error.mean() + 0.02 * mix).argmin(1)
    budgets = (
        Budget(name, table.ravel(), float(table[np.arange(layers), chosen].sum() * rng.uniform(0.97, 1)))
        for name, table in tables.items()
    )
    start = np.arange(layers + 1) * 6
    return ChoiceProgram(tuple(f"layer{i}" for i in range(layers)), start, error.ravel(), tuple(budgets))


def _answer(solve: Callable[[], Solution]) -> Answer:
    clock = Clock()
    found = solve()
    return Answer(found.objective if found.choice.size else None, found.status == "optimal", *clock.read())


def rule(solver: Callable[..., Solution], program: ChoiceProgram, tolerance: float, limit: float) -> Answer:
    """A registered solver without proof."""
    return _answer(lambda: solver(program))


def exact(
    solver: Callable[..., Solution], program: ChoiceProgram, tolerance: float, limit: float, **options: Any
) -> Answer:
    """A registered solver with proof."""
    return _answer(lambda: solver(program, tolerance=tolerance, seconds=limit, **options))


def bundled(backend: str, program: ChoiceProgram, tolerance: float, limit: float) -> Answer:
    """Another solver that OR-Tools ships, as it is; an answer over a budget is none."""
    from ortools.linear_solver import pywraplp

    model = LinearModel(program, backend)
    parameters = pywraplp.MPSolverParameters()
    parameters.SetDoubleParam(parameters.RELATIVE_MIP_GAP, tolerance)
    model.solver.SetTimeLimit(int(limit * 1000))
    clock = Clock()
    status = model.solver.Solve(parameters)
    taken = clock.read()
    choice = model.choice() if status in (model.solver.OPTIMAL, model.solver.FEASIBLE) else None
    within = choice is not None and program.feasible(choice)
    return Answer(program.value(choice) if within else None, within and status == model.solver.OPTIMAL, *taken)


SOLVERS: dict[str, Solve] = {
    "cp-sat, 1 worker (default)": partial(exact, cp_sat),
    "cp-sat, 2 workers": partial(exact, cp_sat, workers=2),
    "mip (SCIP)": partial(exact, mip),
    "HiGHS of OR-Tools": partial(bundled, "HIGHS"),
    "CBC of OR-Tools": partial(bundled, "CBC"),
    "greedy": partial(rule, greedy),
    "one threshold (Apple)": partial(rule, threshold),
}


def run(solve: Solve, program: ChoiceProgram, tolerance: float, limit: float) -> Answer:
    """Solve, and keep what the solver prints to itself."""
    with contextlib.redirect_stdout(io.StringIO()):
        return solve(program, tolerance, limit)


def main() -> None:
    """Solve the same programs with every solver, and print one row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=300)
    parser.add_argument("--programs", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative gap that counts as optimal")
    parser.add_argument("--limit", type=float, default=40.0, help="seconds for one program")
    args = parser.parse_args()
    programs = [network_program(args.layers, seed) for seed in range(args.programs)]
    records = Records("solvers", vars(args))

    def solved(solve: Solve) -> list[Answer]:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            process.submit(run, solve, network_program(5, 0), args.tolerance, args.limit).result()  # imports
            jobs = [process.submit(run, solve, program, args.tolerance, args.limit) for program in programs]
            return [job.result() for job in jobs]

    answers: dict[str, list[Answer]] = {}
    for name, solve in SOLVERS.items():
        found = records.get(name, partial(solved, solve))
        answers[name] = [Answer(*answer) for answer in found]
        print(f"{name}: {', '.join(f'{a.seconds:.2f}' for a in answers[name])} s", flush=True)
    best = [min(a[i].objective or np.inf for a in answers.values() if a[i].proven) for i in range(len(programs))]
    print(f"{args.layers} layers x 6 widths x 3 budgets, {args.programs} programs, gap {args.tolerance:g}")
    print("| solver | proven | median CPU s | slowest | median s | slowest | worst objective / optimum - 1 |")
    print("|---|---|---|---|---|---|---|")
    for name, found in answers.items():
        times = [f"{statistics.median(v):.2f} | {max(v):.2f}" for v in zip(*(a[3:1:-1] for a in found), strict=True)]
        above = [(a.objective or np.inf) / b - 1 for a, b in zip(found, best, strict=True)]
        proven = sum(answer.proven for answer in found)
        print(f"| {name} | {proven} of {len(found)} | {' | '.join(times)} | {max(above):.1e} |")


if __name__ == "__main__":
    main()
