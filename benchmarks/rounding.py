"""Which regulariser of learned rounding suits all blocks: held-out error of some blocks, against nearest rounding.

    python -m benchmarks.rounding [--model digits | emoji] [--iterations 120]

Each block learns its rounding at 4 bits from every other recorded call and is judged on the calls between. Plain: the
papers' sums (loss + 0.01 * sum of undecided). Relative: the loss in units of nearest rounding's, the regulariser per
variable.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.records import Records
from benchmarks.tfmq import WEIGHTS, Case
from dq_plugins.bundled import NAMES
from dq_plugins.calibration.call import first_tensor
from dq_plugins.plan import Targets
from dq_plugins.quantized.block_cache import BlockCache, record_block
from dq_plugins.quantized.learner import Learner, RoundingOptions
from dq_plugins.quantized.soft_rounding import SoftRounding
from dq_plugins.quantized.student import planned_student
from dq_plugins.quantized.units import Unit, find_units
from dq_plugins.recipe import PassContext

SETTINGS = {
    "plain 0.01 (papers)": (0.01, False),
    "plain 1": (1.0, False),
    "relative 1e3": (1e3, True),
    "relative 1e5": (1e5, True),
    "relative 1e6": (1e6, True),
}


def finish(steps: Generator[int, None, Any]) -> None:
    """Run an optimisation to its end."""
    for _ in steps:
        pass


def block_loss(block: torch.nn.Module, prefix: str, cache: BlockCache, weights: dict[str, Tensor], call: int) -> Tensor:
    """Mean squared error of a block's output in one recorded call, summed over channels."""
    args, kwargs, target = cache.get(call)
    replaced = {f"{name}.weight".removeprefix(prefix): w for name, w in weights.items()}
    output = first_tensor(torch.func.functional_call(block, replaced, args, kwargs))
    return (output - target).square().sum(-1 if output.dim() == 3 else 1).mean()


def judge(unit: Unit, cache: BlockCache, student: torch.nn.Module, case: Case, plan: Any, iterations: int) -> dict:
    """Held-out error over that of nearest rounding, by setting."""
    block, prefix = student.get_submodule(unit.module), f"{unit.module}."
    train, test = range(0, len(cache), 2), range(1, len(cache), 2)
    order = torch.randint(len(train), (iterations,), generator=torch.Generator().manual_seed(0)).tolist()

    def held_out(weights: dict[str, Tensor]) -> float:
        with torch.no_grad():
            return sum(float(block_loss(block, prefix, cache, weights, i)) for i in test)

    found = {}
    for label, (weight, relative) in SETTINGS.items():
        variables = {
            n: SoftRounding(case.denoiser.get_submodule(n).weight, plan.layers[n].weight)  # type: ignore[arg-type]
            for n in unit.layers
        }
        options = RoundingOptions(iterations, 1e-2, weight, relative)
        loss = lambda w, i: block_loss(block, prefix, cache, w, train[order[i]])  # noqa: E731
        finish(Learner(variables, loss, options).run())
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
        student = planned_student(case.denoiser, plan)
        for unit in (units[2], units[len(units) // 2], units[-3]):
            if unit.module not in records.data:
                calls = list(range(len(calibration)))
                cache = record_block(
                    case.denoiser, student, unit.module, calibration, calls, Path(folder) / unit.module
                )
                records.put(unit.module, judge(unit, cache, student, case, plan, args.iterations))


if __name__ == "__main__":
    main()
