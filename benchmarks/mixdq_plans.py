"""What the objectives predict and what their plans are worth, on a bundled denoiser.

    python -m benchmarks.mixdq_plans [--model digits | emoji] [--random 60] [--plot front.png]

1. Predicted against true noise power of the output over random plans: the sum of noise powers, and the paper's sum of
   SQNR (dB) and SSIM over layers. True noise is of held-out seeds, all chosen entries quantized together.
2. True SQNR at 3, 4 and 5 mean bits of a weight: uniform widths, greedy, one threshold (Apple), the paper's program
   with its coupling scan, ours. Inputs have 8 bits, except in the last table, where they share the program.
3. The plot of error against size, with the true errors.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.mixdq_setting import ACT_CHOICES, WEIGHT_CHOICES, Setting, arguments, prepare
from benchmarks.records import Records
from dq_plugins.errors import BudgetError
from dq_plugins.passes.allocation.coupling import mixdq_widths, score
from dq_plugins.passes.allocation.front import Front, draw, fronts, mean_weight_bits
from dq_plugins.passes.allocation.problem import AllocationProblem, Budgets, allocate
from dq_plugins.plan.layers import EDGE_ROLES
from dq_plugins.progress import finish
from dq_plugins.quantized.candidates import Entry
from dq_plugins.quantized.width import Width, WidthChoices, entries_of
from dq_plugins.sensitivity.exact_noise import ExactQuality, final_samples
from dq_plugins.sensitivity.measure import measure
from dq_plugins.sensitivity.probes import ContentProbes, QualityProbes
from dq_plugins.sensitivity.sensitivity_table import Group, SensitivityTable, cost, entries_to_check, relative

UNIFORM = "uniform, first and last layers 8 bits"
SIZES = (3.0, 3.5, 4.0, 4.5, 5.0, 6.0)


def measured(setting: Setting) -> SensitivityTable:
    """The table that the pass ``sensitivity`` makes by default, with content."""
    candidates, calls = setting.candidates, setting.calibration.subset(per_timestep=2)
    probes = finish(measure(QualityProbes(setting.denoiser, candidates, calls, -(-160 // len(calls)))))
    table = SensitivityTable(relative(probes, candidates), calls=cost(probes))
    chosen = entries_to_check(table, 32)
    few = setting.calibration.subset(per_timestep=1)
    exact = finish(measure(ExactQuality(setting.denoiser, candidates.subset(chosen), few)))
    table = table.corrected(relative(exact, candidates.subset(chosen)), cost(exact))
    content = finish(measure(ContentProbes(setting.denoiser, candidates, setting.trajectories()[:1], 2)))
    parts = {part: relative(content, candidates, f"#{part}") for part in ("structure", "texture")}
    return replace(table, **parts)


def kept(records: Records, measure: Callable[[], SensitivityTable]) -> SensitivityTable:
    """The table as it was written, measured now if it was not."""
    parts = ("noise", "structure", "texture")
    if "table" not in records.data:
        table = measure()
        written = {part: [[*entry, value] for entry, value in getattr(table, part).items()] for part in parts}
        records.put("table", written | {"calls": table.calls})
    stored = records.data["table"]
    values = {p: {Entry(layer, operand, bits): v for layer, operand, bits, v in stored[p]} for p in parts}
    return SensitivityTable(**values, calls=stored["calls"])


def db(noise: float) -> float:
    """Signal-to-noise ratio in dB of a relative noise power."""
    return -10 * math.log10(noise) if noise > 0 else math.inf


def random_plans(setting: Setting, table: SensitivityTable, count: int) -> list[list[Entry]]:
    """Random widths for every layer and operand, as entries."""
    rng = np.random.default_rng(0)

    def drawn() -> list[Entry]:
        names = setting.candidates.layers
        widths = {name: Width(int(rng.choice(WEIGHT_CHOICES)), int(rng.choice(ACT_CHOICES))) for name in names}
        return [e for e in entries_of(widths) if e in table.noise]

    return [drawn() for _ in range(count)]


def prediction(setting: Setting, table: SensitivityTable, count: int, records: Records) -> dict[str, float]:
    """Rank correlation of both objectives with the true noise over random plans."""
    groups, plans = table.metric_kinds(), random_plans(setting, table, count)
    sums = [sum(table.noise[e] for e in entries) for entries in plans]
    paper = [-sum(score(table, e, groups[e.layer]) for e in entries) for entries in plans]
    true: list[float] = list(records.data.get("true noise of random plans", []))
    for entries in plans[len(true) :]:
        true.append(setting.true_noise(entries))
        records.put("true noise of random plans", true)
    return {
        "plans": count,
        "spearman, sum of noise powers": spearmanr(sums, true).statistic,
        "spearman, the paper's sum of dB and SSIM": spearmanr(paper, true).statistic,
        "predicted / true, geometric mean": math.exp(
            sum(math.log(s / t) for s, t in zip(sums, true, strict=True)) / count
        ),
    }


def weights_only(setting: Setting, table: SensitivityTable) -> AllocationProblem:
    """The problem whose inputs all have 8 bits."""
    return setting.problem(dict(table.noise), default_choices=WidthChoices(WEIGHT_CHOICES, (8,)))


def paper_menu(problem: AllocationProblem, groups: Mapping[str, Group]) -> AllocationProblem:
    """The problem with the widths of the paper's code: content layers 2, 4 or 8 bits, quality layers 4 or 8."""
    menus: dict[Group, tuple[int, ...]] = {"content": (2, 4, 8), "quality": (4, 8)}
    choices = {name: WidthChoices(menus[groups[name]], (8,)) for name in problem.layers}
    return replace(problem, choices=choices)


def paper_plan(setting: Setting, table: SensitivityTable, problem: AllocationProblem) -> Mapping[str, Width]:
    """The plan of the paper's program: the coupling with the least pixel error of one recorded run; empty: none."""
    run = setting.trajectories()[0]

    def image_error(widths: Mapping[str, Width]) -> float:
        final = final_samples(setting.denoiser, setting.candidates, entries_of(widths), run)
        return float((final - run.final()).double().square().mean())

    try:
        return mixdq_widths(problem, table, table.metric_kinds(), image_error)[0]
    except BudgetError:  # no coupling of the grid fits: quality layers have 4 bits at least
        return {}


def true_fronts(setting: Setting, table: SensitivityTable, records: Records) -> list[Front]:
    """Fronts of all rules with the true error of every point; uniform widths spare the first and last layers."""
    problem = weights_only(setting, table)
    found = list(fronts(problem, SIZES, least=edges(setting)))
    found[-1] = found[-1]._replace(rule=UNIFORM)
    narrow = paper_menu(problem, table.metric_kinds())
    for place, (rule, offered, plan_of) in enumerate((
        ("the paper's program", problem, partial(paper_plan, setting, table)),
        ("the paper's program, its menu", narrow, partial(paper_plan, setting, table)),
        ("exact (ours), the paper's menu", narrow, lambda within: allocate(within).widths),
    )):  # fmt: skip
        budgets = [replace(offered, budgets=Budgets(weight_bits=bits, act_bits=8.0)) for bits in SIZES]
        plans = [plan for plan in map(plan_of, budgets) if plan]
        found.insert(1 + place, Front(rule, (), tuple(plans)))
    measured = []
    for front in found:
        rows = records.get(f"true SQNR in dB, {front.rule}", partial(true_points, setting, problem, front))
        measured.append(front._replace(points=tuple((size, 10 ** (-value / 10)) for size, value in rows)))
        print(f"  {front.rule:24} {rows}", flush=True)
    return measured


def edges(setting: Setting) -> dict[str, int]:
    """The first and last layers, which scripts leave at 8 bits."""
    layers = setting.context.partition.layers
    return {name: 8 for name in setting.candidates.layers if layers[name].roles & EDGE_ROLES}


def true_points(setting: Setting, problem: AllocationProblem, front: Front) -> list[list[float]]:
    """Mean bits of a weight and true SQNR in dB of every point."""
    return [
        [round(mean_weight_bits(problem, w), 3), round(db(setting.true_noise(entries_of(w))), 2)] for w in front.widths
    ]


def gains(found: list[Front]) -> dict[str, float]:
    """How much better than uniform widths ours is at 4 and 3 mean bits, in dB."""
    ours = {limit: error for limit, (_, error) in zip(SIZES, found[0].points, strict=True)}
    uniform = {round(size): error for size, error in found[-1].points}
    pairs = ((bits, other) for bits in (4, 3) for other in (bits, bits + 1))
    return {f"{bits}.0 bits over uniform {b}": db(ours[float(bits)]) - db(uniform[b]) for bits, b in pairs}


def with_inputs(setting: Setting, table: SensitivityTable) -> dict[str, Any]:
    """Weights and inputs in one program: ours, and uniform at the same means."""
    found = {}
    for weight, act in ((4, 6), (4, 8), (6, 6)):
        budgets = Budgets(weight_bits=weight, act_bits=act)
        ours = allocate(setting.problem(dict(table.noise), budgets=budgets))
        uniform = entries_of({n: Width(weight, act) for n in setting.candidates.layers})
        uniform = [e for e in uniform if e in table.noise]
        noise = {"ours": setting.true_noise(entries_of(ours.widths)), "uniform": setting.true_noise(uniform)}
        found[f"W{weight}A{act}"] = {k: db(v) for k, v in noise.items()} | {"status": ours.solution.status}
    return found


def main() -> None:
    """Measure once, then predict, allocate and compare."""
    parser = arguments(__doc__)
    parser.add_argument("--random", type=int, default=60, help="random plans")
    parser.add_argument("--plot", type=Path, help="file for the plot of error against size")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    records = Records(f"mixdq_plans-{args.model}", {k: v for k, v in vars(args).items() if k != "plot"})
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(args.model, Path(folder), args.steps)
        table = kept(records, partial(measured, setting))
        print(f"{args.model}: {len(setting.candidates.layers)} layers, {len(table.noise)} entries")
        predicted = prediction(setting, table, args.random, records)
        records.put("prediction", predicted)
        print(json.dumps(predicted, indent=1), "true SQNR in dB of the output, held-out seeds", sep="\n", flush=True)
        found = true_fronts(setting, table, records)
        records.put("gains in dB", gains(found))
        records.put("weights and inputs, true SQNR in dB", with_inputs(setting, table))
        print(json.dumps({k: records.data[k] for k in list(records.data)[-2:]}, indent=1), flush=True)
        if args.plot:
            chosen = found[0].points[SIZES.index(4.0)]
            draw(
                {front.rule: front.points for front in found}, chosen, "true noise power of the output / signal"
            ).savefig(args.plot, dpi=150)


if __name__ == "__main__":
    main()
