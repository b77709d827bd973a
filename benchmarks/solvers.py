"""Time to proven optimality of bit allocation, beside SCIP, CBC and HiGHS through their own Python packages.

    python -m benchmarks.solvers [--layers 1000] [--programs 5] [--tolerance 0] [--limit 60]

A program looks like a network: log-normal parameters, MACs and sensitivities, noise that falls as 4^-bits, 6 widths,
and three budgets together: weight bits, BitOps, and a latency table that no formula gives. The limits are up to 3 %
below what the best plan for a random mix of the three takes, so that all of them bind and no plan meets them exactly
(solvers that allow a budget to be exceeded by 1e-6 would gain from that). Every solver gets the same programs,
tolerance and time; the peers get the program as it is (models are built before the clock starts). Every solver runs
in a process of its own: OR-Tools ships another HiGHS, and two of them do not fit into one. Peers come with ``pip
install 'dq-plugins[bench]'``; one that is missing is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from benchmarks.records import Records
from dq_plugins.solvers import Budget, ChoiceProgram, Solution
from dq_plugins.solvers.baselines import greedy, threshold
from dq_plugins.solvers.cp_sat import cp_sat
from dq_plugins.solvers.mip import mip

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


def rows(program: ChoiceProgram) -> Iterator[tuple[np.ndarray, float]]:
    """Budgets as rows with largest entry 1, which all floating-point solvers like."""
    for budget in program.budgets:
        unit = float(np.abs(budget.cost).max())
        yield budget.cost / unit, budget.limit / unit


def pyscipopt(program: ChoiceProgram, tolerance: float, limit: float) -> Answer:
    """SCIP through PySCIPOpt."""
    from pyscipopt import Model, quicksum

    model = Model()
    model.hideOutput()
    x = [model.addVar(vtype="B") for _ in program.error]
    for menu in program.menus():
        model.addCons(quicksum(x[c] for c in menu) == 1)
    for cost, bound in rows(program):
        model.addCons(quicksum(float(a) * v for a, v in zip(cost, x, strict=True)) <= bound)
    model.setObjective(quicksum(float(e) * v for e, v in zip(program.error, x, strict=True)))
    model.setParam("limits/gap", tolerance)
    model.setParam("numerics/feastol", 1e-9)
    model.setParam("limits/time", limit)
    clock = Clock()
    model.optimize()
    taken = clock.read()
    objective = model.getObjVal() if model.getNSols() else None
    return Answer(objective, model.getStatus() in ("optimal", "gaplimit"), *taken)


def pulp_cbc(program: ChoiceProgram, tolerance: float, limit: float) -> Answer:
    """CBC through PuLP, with two threads; the clock includes the file that PuLP hands it."""
    import pulp

    model = pulp.LpProblem("bits", pulp.LpMinimize)
    x = [pulp.LpVariable(f"x{c}", cat="Binary") for c in range(len(program.error))]
    model += pulp.LpAffineExpression(zip(x, program.error.tolist(), strict=True))
    for menu in program.menus():
        model += pulp.LpAffineExpression([(x[c], 1) for c in menu]) == 1
    for cost, bound in rows(program):
        model += pulp.LpAffineExpression(zip(x, cost.tolist(), strict=True)) <= bound
    clock = Clock()
    model.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=tolerance, timeLimit=limit, threads=2))
    taken = clock.read()
    found = model.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    objective = float(pulp.value(model.objective)) if found else None
    return Answer(objective, model.sol_status == pulp.LpSolutionOptimal and taken[0] < limit, *taken)


def highs(program: ChoiceProgram, tolerance: float, limit: float) -> Answer:
    """HiGHS through highspy."""
    import highspy

    model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    model.setOptionValue("mip_rel_gap", tolerance)
    model.setOptionValue("mip_feasibility_tolerance", 1e-9)
    model.setOptionValue("primal_feasibility_tolerance", 1e-9)
    model.setOptionValue("time_limit", limit)
    count = len(program.error)
    model.addVars(count, np.zeros(count), np.ones(count))
    columns = np.arange(count, dtype=np.int32)
    model.changeColsCost(count, columns, program.error)
    model.changeColsIntegrality(count, columns, np.array([highspy.HighsVarType.kInteger] * count))
    for menu in program.menus():
        model.addRow(1.0, 1.0, len(menu), np.array(menu, dtype=np.int32), np.ones(len(menu)))
    for cost, bound in rows(program):
        model.addRow(-highspy.kHighsInf, bound, count, columns, cost)
    clock = Clock()
    model.run()
    taken = clock.read()
    info = model.getInfo()
    objective = info.objective_function_value if info.primal_solution_status == 2 else None
    return Answer(objective, model.getModelStatus() == highspy.HighsModelStatus.kOptimal, *taken)


def plain_cp_sat(program: ChoiceProgram, tolerance: float, limit: float) -> Answer:
    """CP-SAT given the whole program, with its own choice of strategies: what the cores gain."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    x = [model.new_bool_var("") for _ in program.error]
    for menu in program.menus():
        model.add_exactly_one(x[menu.start : menu.stop])
    for cost, bound in rows(program):
        scaled = np.ceil(cost * 2**40).astype(np.int64).tolist()
        model.add(cp_model.LinearExpr.weighted_sum(x, scaled) <= int(bound * 2**40))
    scale = 2**40 / float(program.error.max())
    model.minimize(cp_model.LinearExpr.weighted_sum(x, np.rint(program.error * scale).astype(np.int64).tolist()))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 2
    solver.parameters.relative_gap_limit = tolerance
    solver.parameters.max_time_in_seconds = limit
    clock = Clock()
    status = solver.solve(model)
    found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    objective = solver.objective_value / scale if found else None
    return Answer(objective, status == cp_model.OPTIMAL, *clock.read())


def solvers() -> dict[str, Solve]:
    """Every solver that can run here, by the name in the table."""
    found: dict[str, Solve] = {
        "cp-sat (ours), 1 worker": partial(exact, cp_sat),
        "cp-sat (ours), 2 workers": partial(exact, cp_sat, workers=2),
        "mip (ours), SCIP": partial(exact, mip),
        "mip (ours), CBC": partial(exact, mip, backend="CBC"),
        "greedy": partial(rule, greedy),
        "one threshold (Apple)": partial(rule, threshold),
        "CP-SAT as it is": plain_cp_sat,
    }
    peers = {
        "pyscipopt": ("SCIP (PySCIPOpt)", pyscipopt),
        "pulp": ("CBC (PuLP)", pulp_cbc),
        "highspy": ("HiGHS (highspy)", highs),
    }
    for package, (name, solve) in peers.items():
        if find_spec(package) is None:
            print(f"{package} is not installed: {name} is left out")
        else:
            found[name] = solve
    return found


def run(solve: Solve, program: ChoiceProgram, tolerance: float, limit: float) -> Answer:
    """Solve, and keep what the solver prints to itself."""
    with contextlib.redirect_stdout(io.StringIO()):
        return solve(program, tolerance, limit)


def main() -> None:
    """Solve the same programs with every solver, and print one row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--programs", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative gap that counts as optimal")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one program")
    args = parser.parse_args()
    programs = [network_program(args.layers, seed) for seed in range(args.programs)]
    records = Records(f"solvers-gap-{args.tolerance:g}", vars(args))

    def solved(solve: Solve) -> list[Answer]:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            process.submit(run, solve, network_program(5, 0), args.tolerance, args.limit).result()  # imports
            jobs = [process.submit(run, solve, program, args.tolerance, args.limit) for program in programs]
            return [job.result() for job in jobs]

    answers: dict[str, list[Answer]] = {}
    for name, solve in solvers().items():
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
