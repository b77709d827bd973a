"""Which regulariser of learned rounding suits all blocks: held-out error of some blocks, against nearest rounding.

    python -m benchmarks.rounding [--model digits | emoji] [--iterations 120]

Each block learns its rounding at 4 bits from every other recorded call and is judged on the calls between. Plain: the
papers' sums (loss + 0.01 * sum of undecided). Relative: the loss in units of nearest rounding's, the regulariser per
variable.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.records import Records
from benchmarks.tfmq import WEIGHTS, Case
from dq_plugins.bundled import NAMES
from dq_plugins.plan import QuantPlan, Targets
from dq_plugins.progress import finish
from dq_plugins.quantized.block_cache import BlockCache, block_loss, record_block
from dq_plugins.quantized.learner import Learner, RoundingOptions
from dq_plugins.quantized.reconstruction_units import Unit, find_units
from dq_plugins.quantized.run import QuantizedRun, States, planned_run, planned_states
from dq_plugins.quantized.soft_rounding import SoftRounding
from dq_plugins.recipe import PassContext

SETTINGS = {
    "plain 0.01 (papers)": (0.01, False),
    "plain 1": (1.0, False),
    "relative 1e3": (1e3, True),
    "relative 1e5": (1e5, True),
    "relative 1e6": (1e6, True),
}


def judge(unit: Unit, cache: BlockCache, run: QuantizedRun, states: States, plan: QuantPlan, iterations: int) -> dict:
    """Held-out error over that of nearest rounding, by setting."""
    train, test = range(0, len(cache), 2), range(1, len(cache), 2)
    order = torch.randint(len(train), (iterations,), generator=torch.Generator().manual_seed(0)).tolist()

    def error(weights: dict[str, Tensor], call: int) -> Tensor:
        learning = {name: states[name]._replace(weight=w) for name, w in weights.items()}
        return block_loss(run, unit, cache, call, {**states, **learning})

    def held_out(weights: dict[str, Tensor]) -> float:
        with torch.no_grad():
            return sum(float(error(weights, i)) for i in test)

    found = {}
    for label, (weight, relative) in SETTINGS.items():
        variables = {n: SoftRounding(run.full_weight(n), plan.layers[n].weight) for n in unit.layers}  # type: ignore[arg-type]
        options = RoundingOptions(iterations, 1e-2, weight, relative)
        finish(Learner(variables, lambda w, i: error(w, train[order[i]]), options).run())
        nearest = held_out({n: v.nearest() for n, v in variables.items()})
        found[label] = held_out({n: v.hard() for n, v in variables.items()}) / nearest
        print(f"  {unit.module:32} {label:20} {found[label]:.3f}", flush=True)
    return found


def main() -> None:
    """Some blocks of one bundled denoiser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", choices=NAMES)
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    records = Records(f"rounding-{args.model}", vars(args))
    with tempfile.TemporaryDirectory() as folder:
        case = Case(args.model, args.steps, Path(folder))
        calibration = case.calibration(0)
        plan = case.plan((WEIGHTS,), 0, weight_bits=4, act_bits=None)
        context = PassContext(case.denoiser, calibration, Targets(4, None))
        layers = [n for n, p in plan.layers.items() if p.weight and context.partition.layers[n].kind != "embedding"]
        units = find_units(context.partition, layers)
        run = planned_run(case.denoiser, plan)
        states = planned_states(run, plan)
        for unit in (units[2], units[len(units) // 2], units[-3]):
            if unit.module not in records.data:
                with run:
                    cache = record_block(run, unit.module, calibration, Path(folder) / unit.module, lambda: states)
                    records.put(unit.module, judge(unit, cache, run, states, plan, args.iterations))


if __name__ == "__main__":
    main()
