"""Which learned rounding suits all blocks: held-out error of some blocks, against nearest rounding.

    python -m benchmarks.rounding [--model digits | emoji] [--iterations 120]

Each block learns its rounding at 4 bits from every other recorded call and is judged on the calls between. AdaRound,
plain: the papers' sums (loss + 0.01 * sum of undecided); relative: the loss in units of that before learning, the
regulariser per variable. Sign: sign steps on straight-through offsets, from nearest rounding or from GPTQ's codes.
A4: activations of 4 bits where the block is judged, and where it learns only if it says so.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.records import Records
from benchmarks.tfmq import GROUPED, WEIGHTS, Case
from dq_plugins.bundled_denoisers import NAMES
from dq_plugins.plan import QuantPlan, Targets, WeightQuant
from dq_plugins.progress import finish
from dq_plugins.quantized.block_cache import BlockCache, BlockRecorder, block_loss
from dq_plugins.quantized.learner import Learner
from dq_plugins.quantized.offset_rounding import SignSteps
from dq_plugins.quantized.reconstruction_units import find_units
from dq_plugins.quantized.rounding_variables import RoundingMethod
from dq_plugins.quantized.run import QuantizedRun, States, planned_run, planned_states
from dq_plugins.quantized.soft_rounding import AdaRound
from dq_plugins.recipe import PassContext, Step


class Setting(NamedTuple):
    """How a block learns: the method, whether GPTQ comes first, and the width of activations here and there."""

    method: type[RoundingMethod]
    options: tuple = ()
    gptq: bool = False
    judged_at: str = "A32"
    learned_at: str = "A32"


SETTINGS = {
    "plain 0.01 (papers)": Setting(AdaRound, (0.01, False)),
    "plain 1": Setting(AdaRound, (1.0, False)),
    "relative 1e3": Setting(AdaRound, (1e3, True)),
    "relative 1e5": Setting(AdaRound, (1e5, True)),
    "relative 1e6": Setting(AdaRound, (1e6, True)),
    "sign": Setting(SignSteps),
    "sign from GPTQ": Setting(SignSteps, gptq=True),
    "A4: relative 1e5": Setting(AdaRound, (1e5, True), judged_at="A4"),
    "A4: sign": Setting(SignSteps, judged_at="A4"),
    "A4: sign, quantized inputs": Setting(SignSteps, judged_at="A4", learned_at="A4"),
    "A4: sign from GPTQ, quantized inputs": Setting(SignSteps, gptq=True, judged_at="A4", learned_at="A4"),
}


class Block:
    """One block, recorded with activations in floating point and with quantized ones.

    Args:
        run: of the denoiser; open.
        caches: by width of activations.
        states: likewise.
        plans: by whether GPTQ has rounded the weights.
        iterations: of learning.
    """

    def __init__(
        self,
        run: QuantizedRun,
        caches: dict[str, BlockCache],
        states: dict[str, States],
        plans: dict[bool, QuantPlan],
        iterations: int,
    ) -> None:
        self.run, self.caches, self.states, self.plans, self.iterations = run, caches, states, plans, iterations
        self.layers = caches["A32"].unit.layers

    def error(self, weights: dict[str, Tensor], call: int, width: str) -> Tensor:
        states = self.states[width]
        learning = {name: states[name]._replace(weight=w) for name, w in weights.items()}
        return block_loss(self.run, self.caches[width], call, {**states, **learning})

    def judge(self, setting: Setting) -> float:
        """Held-out error over that of nearest rounding."""
        count = len(self.caches["A32"])
        train, test = range(0, count, 2), range(1, count, 2)
        order = torch.randint(len(train), (self.iterations,), generator=torch.Generator().manual_seed(0)).tolist()
        method, width = setting.method(self.iterations, 1e-2, *setting.options), setting.learned_at

        start = {n: replace(self.plans[setting.gptq].layers[n].weight) for n in self.layers}  # type: ignore[type-var]
        variables = {n: method.variables(self.run.full_weight(n), quant) for n, quant in start.items()}  # type: ignore[arg-type]
        learner = Learner(
            variables,
            lambda w, i: self.error(w, train[order[i]], width),
            method,
            judge=lambda w, i: self.error(w, train[i], width),
            probes=len(train),
        )
        learned = finish(learner.run())
        for name, codes in learned.decided.items():
            start[name].codes = codes

        def held_out(quants: dict[str, WeightQuant]) -> float:
            weights = {n: quant.fake_quantize(self.run.full_weight(n)) for n, quant in quants.items()}
            with torch.no_grad():
                return sum(float(self.error(weights, i, setting.judged_at)) for i in test)

        return held_out(start) / held_out({n: self.plans[False].layers[n].weight for n in self.layers})  # type: ignore[misc]


def main() -> None:
    """Some blocks of one bundled denoiser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", choices=NAMES)
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    records = Records(f"rounding-{args.model}-{args.iterations}", vars(args))
    with tempfile.TemporaryDirectory() as folder:
        case = Case(args.model, args.steps, Path(folder))
        calibration = case.calibration(0)
        steps = {False: (WEIGHTS, *GROUPED), True: (WEIGHTS, *GROUPED, Step("gptq"))}
        plans = {gptq: case.plan(each, 0, weight_bits=4, act_bits=4) for gptq, each in steps.items()}
        plan = plans[False]
        context = PassContext(case.denoiser, calibration, Targets(4, 4))
        layers = [n for n, p in plan.layers.items() if p.weight and context.partition.layers[n].kind != "embedding"]
        units = find_units(context.partition, layers)
        run = planned_run(case.denoiser, plan)
        states = {w: planned_states(run, plan, quantize_inputs=w == "A4") for w in ("A32", "A4")}
        recorder = BlockRecorder(units, calibration, Path(folder) / "blocks")
        for unit in (units[2], units[len(units) // 2], units[-3]):
            found = records.data.get(unit.module, {})
            with run:
                caches = {w: recorder.record(run, unit, lambda w=w: states[w], w) for w in states}
                for label, setting in SETTINGS.items():
                    if label not in found:
                        block = Block(run, caches, states, plans, args.iterations)
                        records.put(unit.module, found := found | {label: block.judge(setting)})
                    print(f"  {unit.module:32} {label:36} {found[label]:.3f}", flush=True)


if __name__ == "__main__":
    main()
