"""What the objectives predict and what their plans are worth, on a bundled denoiser.

    python -m benchmarks.mixdq_plans [--model digits | emoji] [--random 60] [--plot front.png]

1. Predicted against true noise power of the output over random plans: the sum of noise powers, and the paper's sum of
   SQNR (dB) and SSIM over layers. True noise is of held-out seeds, all chosen entries quantized together.
2. True SQNR at 3, 4 and 5 mean bits of a weight: uniform widths, greedy, one threshold (Apple), the paper's program
   with its coupling scan, ours. Inputs have 8 bits, except in the last table, where they share the program.
3. The plot of error against size, with the true errors.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.mixdq_setting import ACT_MENU, WEIGHT_MENU, Setting, arguments, prepare
from dq_plugins.allocation import AllocationProblem, Budgets, Front, Menu, Width, allocate, fronts
from dq_plugins.allocation.front import draw, mean_weight_bits
from dq_plugins.allocation.mixdq import mixdq_widths, score
from dq_plugins.allocation.problem import entries_of
from dq_plugins.sensitivity import ContentProbes, ExactQuality, QualityProbes, SensitivityTable, measure
from dq_plugins.sensitivity.exact import final_samples
from dq_plugins.sensitivity.measure import finish
from dq_plugins.sensitivity.table import cost, entries_to_check, relative, spearman

SIZES = (3.0, 3.5, 4.0, 4.5, 5.0, 6.0)


def measured(setting: Setting) -> SensitivityTable:
    """The table that the pass ``sensitivity`` makes by default, with content."""
    candidates, calls = setting.candidates, setting.calibration.subset(per_timestep=2)
    probes = finish(measure(QualityProbes(setting.denoiser, candidates, calls, -(-160 // len(calls)))))
    table = SensitivityTable(relative(probes, candidates), calls=cost(probes))
    chosen = entries_to_check(table, 32)
    few = setting.calibration.subset(per_timestep=1)
    exact = finish(measure(ExactQuality(setting.denoiser, candidates, few, chosen)))
    table = table.corrected(relative(exact, candidates.subset(chosen)), cost(exact))
    content = finish(measure(ContentProbes(setting.denoiser, candidates, setting.trajectories()[:1], 2)))
    parts = {part: relative(content, candidates, f"#{part}") for part in ("structure", "texture")}
    return replace(table, **parts)


def db(noise: float) -> float:
    """Signal-to-noise ratio in dB of a relative noise power."""
    return -10 * math.log10(noise) if noise > 0 else math.inf


def prediction(setting: Setting, table: SensitivityTable, count: int) -> None:
    """Rank correlation of both objectives with the true noise over random plans."""
    rng = np.random.default_rng(0)
    groups = table.groups()
    sums, paper, true = [], [], []
    for _ in range(count):
        widths = {
            name: Width(int(rng.choice(WEIGHT_MENU)), int(rng.choice(ACT_MENU))) for name in setting.candidates.layers
        }
        entries = [e for e in entries_of(widths) if e in table.noise]
        sums.append(sum(table.noise[e] for e in entries))
        paper.append(-sum(score(table, e, groups[e.layer]) for e in entries))
        true.append(setting.true_noise(entries))
    print(f"{count} random plans, rank correlation of predicted and true noise power")
    print(f"  sum of noise powers           {spearman(sums, true):.3f}")
    print(f"  the paper's sum of dB and SSIM {spearman(paper, true):.3f}")
    ratio = [math.log(s / t) for s, t in zip(sums, true, strict=True)]
    print(f"  predicted / true, geometric mean {math.exp(sum(ratio) / len(ratio)):.2f}")


def weights_only(setting: Setting, table: SensitivityTable) -> AllocationProblem:
    """The problem whose inputs all have 8 bits."""
    return setting.problem(dict(table.noise), default_menu=Menu(WEIGHT_MENU, (8,)))


def paper_plan(setting: Setting, table: SensitivityTable, problem: AllocationProblem) -> Mapping[str, Width]:
    """The plan of the paper's program: the coupling with the least pixel error of one recorded run."""
    run = setting.trajectories()[0]

    def image_error(widths: Mapping[str, Width]) -> float:
        final = final_samples(setting.denoiser, setting.candidates, entries_of(widths), run)
        return float((final - run.final()).double().square().mean())

    return mixdq_widths(problem, table, table.groups(), image_error)[0]


def true_fronts(setting: Setting, table: SensitivityTable) -> list[Front]:
    """Fronts of all rules with the true error of every point."""
    problem = weights_only(setting, table)
    found = list(fronts(problem, SIZES))
    points = [
        paper_plan(setting, table, replace(problem, budgets=Budgets(weight_bits=bits, act_bits=8.0))) for bits in SIZES
    ]
    sizes = tuple(mean_weight_bits(problem, p) for p in points)
    found.insert(1, Front("the paper's program", sizes, (), tuple(points)))
    return [
        replace(front, errors=tuple(setting.true_noise(entries_of(widths)) for widths in front.widths))
        for front in found
    ]


def show(found: list[Front]) -> None:
    """True SQNR by rule and size."""
    print("\ntrue SQNR in dB of the output on held-out seeds, at mean bits of a weight (limit, used)")
    for front in found:
        points = ", ".join(
            f"{size:.2f}: {db(error):.1f}" for size, error in zip(front.sizes, front.errors, strict=True)
        )
        print(f"  {front.rule:24} {points}")
    ours, uniform = found[0], found[-1]
    at = {f.rule: dict(zip((*SIZES,) if f is not uniform else f.sizes, f.errors, strict=True)) for f in (ours, uniform)}
    mine, same = at[ours.rule], {round(size): error for size, error in at[uniform.rule].items()}
    for bits in (4, 3):
        gains = (f"{db(mine[float(bits)]) - db(same[b]):+.1f} dB to uniform {b}" for b in (bits, bits + 1))
        print(f"at {bits}.0 bits: {', '.join(gains)}")


def with_inputs(setting: Setting, table: SensitivityTable) -> None:
    """Weights and inputs in one program."""
    print("\nweights and inputs together, true SQNR in dB: ours, and uniform at the same means")
    for weight, act in ((4, 6), (4, 8), (6, 6)):
        budgets = Budgets(weight_bits=weight, act_bits=act)
        found = allocate(setting.problem(dict(table.noise), budgets=budgets))
        uniform = entries_of({n: Width(weight, act) for n in setting.candidates.layers})
        uniform = [e for e in uniform if e in table.noise]
        ours = db(setting.true_noise(found.entries()))
        print(f"  W{weight}A{act}: {ours:.1f}, {db(setting.true_noise(uniform)):.1f} ({found.solution.status})")


def main() -> None:
    """Measure once, then predict, allocate and compare."""
    parser = arguments(__doc__)
    parser.add_argument("--random", type=int, default=60, help="random plans")
    parser.add_argument("--plot", type=Path, help="file for the plot of error against size")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(args.model, Path(folder), args.steps)
        table = measured(setting)
        print(f"{args.model}: {len(setting.candidates.layers)} layers, {len(table.noise)} entries")
        prediction(setting, table, args.random)
        found = true_fronts(setting, table)
        show(found)
        with_inputs(setting, table)
        if args.plot:
            ours = found[0]
            chosen = (ours.sizes[SIZES.index(4.0)], ours.errors[SIZES.index(4.0)])
            draw(found, chosen, "true noise power of the output / signal").savefig(args.plot, dpi=150)


if __name__ == "__main__":
    main()
