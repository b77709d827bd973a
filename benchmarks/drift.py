"""What predicts the error of the final images: over random plans, each prediction beside the true error.

    python -m benchmarks.drift [--model digits | emoji | terrain] [--plans 60] [--steps 10]

A plan gives every layer's weight and input a random width of the usual choices, with ranges made in one of two ways
(least error, or min-max). The true error is that of sampled images against full precision from the same noise, other
seeds than those recorded. Predicted from recorded calls alone:

- the image error, `dq_plugins.sensitivity.drift`;
- the noise power of the denoiser's output, summed over layers;
- SQNR in dB, summed over layers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from scipy.stats import spearmanr

import dq_plugins as dq
from benchmarks.records import Records
from benchmarks.tfmq import MODELS, Case
from dq_plugins.artifact.codec import encode
from dq_plugins.passes.width_candidates import candidates_of
from dq_plugins.plan import MeasuredSensitivity, RangeMethods
from dq_plugins.progress import finish
from dq_plugins.quantized.candidates import Candidates, Entry
from dq_plugins.quantized.network import SuperNetwork
from dq_plugins.quantized.width import widths_of
from dq_plugins.recipe import PassContext, Recipe, Step
from dq_plugins.sensitivity.drift import DriftProbes, ImageError, image_error
from dq_plugins.sensitivity.exact_noise import ExactContent, ExactQuality
from dq_plugins.sensitivity.measure import measure
from dq_plugins.sensitivity.probes import QualityProbes
from dq_plugins.sensitivity.sensitivity_table import SensitivityTable, cost, entries_to_check, relative
from dq_plugins.sensitivity.trajectory import trajectories_of

WEIGHT_CHOICES, ACT_CHOICES = (2, 3, 4, 6, 8), (4, 6, 8)
DRAWS, CHECKED, IMAGE_PROBES, CHECKED_IMAGES = 80, 32, 8, 64
RANGES = Recipe("ranges", "", (Step("weight-ranges"), Step("timestep-groups"), Step("activation-ranges")))
METHODS = {"least error": RangeMethods("shrink", "mse"), "min-max": RangeMethods("minmax", "minmax")}

Choice = tuple[str, Entry]
"""Method of ranges, and what is quantized how widely."""


@dataclass(frozen=True)
class Setting:
    """A recorded denoiser, and its quantizers by the method of their ranges."""

    case: Case
    calibration: dq.CalibrationSet
    context: PassContext
    candidates: dict[str, Candidates]

    def chosen(self, plan: Sequence[Choice]) -> Candidates:
        """The quantizers of a plan."""
        weights: dict[str, dict[int, Any]] = {}
        inputs: dict[str, dict[int, Any]] = {}
        for method, (layer, operand, bits) in plan:
            made = self.candidates[method]
            if operand == "weight":
                weights[layer] = {bits: made.weights[layer][bits]}
            else:
                inputs[layer] = {bits: made.activations[layer][bits]}
        return Candidates(weights, inputs, made.groups)


def prepare(name: str, steps: int, folder: Path) -> Setting:
    """Record 8 images, and make the quantizers of every width."""
    case = Case(name, steps, folder)
    calibration = case.calibration(0)
    plan = dq.make_plan(case.denoiser, calibration, RANGES, progress=False)
    context = PassContext(case.denoiser, calibration)
    made = {
        name: candidates_of(replace(plan, range_methods=methods), context, WEIGHT_CHOICES, ACT_CHOICES)
        for name, methods in METHODS.items()
    }
    return Setting(case, calibration, context, made)


def random_plans(candidates: Candidates, count: int) -> list[list[Choice]]:
    """Random widths and ranges for every layer and operand; the first so many of one sequence."""
    rng = np.random.default_rng(0)

    def drawn() -> list[Choice]:
        plan: list[Choice] = []
        for layer in candidates.layers:
            plan.append((str(rng.choice(list(METHODS))), Entry(layer, "weight", int(rng.choice(WEIGHT_CHOICES)))))
            act = str(rng.choice(list(METHODS))), Entry(layer, "activation", int(rng.choice(ACT_CHOICES)))
            plan += [act] if layer in candidates.activations else []
        return plan

    return [drawn() for _ in range(count)]


def true_error(setting: Setting, plan: Sequence[Choice], images: int, reference: np.ndarray) -> list[float]:
    """Mean square error of every sampled image."""
    candidates = setting.chosen(plan)
    argument = setting.calibration.timestep_argument
    with SuperNetwork(setting.case.denoiser, candidates, argument) as network, torch.no_grad():
        network.switch(widths_of(candidates.entries()))
        found = setting.case.images(setting.case.denoiser, images)
    return np.square(found - reference).reshape(images, -1).mean(1).tolist()


def true_errors(setting: Setting, plans: Sequence[Sequence[Choice]], images: int, records: Records) -> np.ndarray:
    """``[plans, images]``, written plan by plan."""
    reference = setting.case.images(setting.case.denoiser, images)
    found: list[list[float]] = list(records.data.get("true error of images", []))
    for plan in plans[len(found) :]:
        found.append(true_error(setting, plan, images, reference))
        records.put("true error of images", found)
    return np.array(found)


def measured_noise(setting: Setting, method: str) -> SensitivityTable:
    """Noise power as the pass ``sensitivity`` measures it, with half its draws."""
    candidates, calibration = setting.candidates[method], setting.calibration
    calls, denoiser = calibration.subset(per_timestep=2), setting.case.denoiser
    noise = finish(measure(QualityProbes(denoiser, candidates, calls, -(-DRAWS // len(calls)))))
    table = SensitivityTable(relative(noise, candidates), calls=cost(noise))
    few = candidates.subset(entries_to_check(table, CHECKED))
    exact = finish(measure(ExactQuality(denoiser, few, calibration.subset(per_timestep=1))))
    return table.corrected(relative(exact, few), cost(exact))


def measured_image(setting: Setting, method: str, table: SensitivityTable) -> SensitivityTable:
    """The table with the error of the final image, as the pass measures it."""
    candidates, denoiser = setting.candidates[method], setting.case.denoiser
    runs = trajectories_of(setting.calibration, setting.context.partition.sample_argument)
    image = finish(measure(DriftProbes(denoiser, candidates, runs, IMAGE_PROBES)))
    estimate = image_error(image, candidates.entries())
    alone = estimate.alone()
    few = candidates.subset(sorted(alone, key=alone.__getitem__, reverse=True)[:CHECKED_IMAGES])
    true = finish(measure(ExactContent(denoiser, few, runs, "mse")))
    return table.with_image(estimate, relative(true, few), cost(image) + cost(true))


def kept(records: Records, key: str, measure: Callable[[], SensitivityTable]) -> SensitivityTable:
    """A table as it was written, measured now if it was not."""
    stored = records.get(key, lambda: encode(measure().measured(WEIGHT_CHOICES, ACT_CHOICES), "", {}))
    return SensitivityTable.of(TypeAdapter(MeasuredSensitivity).validate_python(stored))


def tables_of(records: Records, setting: Setting) -> dict[str, SensitivityTable]:
    """Everything that predictions are made from, by method."""
    found = {}
    for method in METHODS:
        noise = kept(records, f"noise, {method}", partial(measured_noise, setting, method))
        found[method] = kept(records, f"image, {method}", partial(measured_image, setting, method, noise))
    return found


def predictions(plans: Sequence[Sequence[Choice]], tables: Mapping[str, SensitivityTable]) -> dict[str, list[float]]:
    """By rule, a number for every plan: the larger, the worse the images."""
    merged = merged_image(tables)
    rules: dict[str, Callable[[Sequence[Choice]], float]] = {
        "image error": lambda plan: merged.of([named(each) for each in plan]),
        "image error without drift between layers": lambda plan: sum(alone[named(each)] for each in plan),
        "noise power": lambda plan: sum(tables[method].noise[entry] for method, entry in plan),
        "SQNR in dB": lambda plan: -sum(min(tables[method].sqnr(entry), 120.0) for method, entry in plan),
    }
    alone = merged.alone()
    return {name: [rule(plan) for plan in plans] for name, rule in rules.items()}


def named(choice: Choice) -> Entry:
    """The entry, its layer named after the method of its range as well."""
    method, entry = choice
    return entry._replace(layer=f"{method}: {entry.layer}")


def merged_image(tables: Mapping[str, SensitivityTable]) -> ImageError:
    """What entries of all methods do to the image."""
    parts = {method: table.image for method, table in tables.items() if table.image is not None}
    random = {named((method, e)): v for method, part in parts.items() for e, v in part.random.items()}
    drift = {named((method, e)): v for method, part in parts.items() for e, v in part.drift.items()}
    return ImageError(random, drift)


def compared(predicted: Sequence[float], true: np.ndarray) -> dict[str, float]:
    """Rank correlation with the mean square error of all images, and with their mean PSNR."""
    return {
        "spearman, mean square error": float(spearmanr(predicted, true.mean(1)).statistic),
        "spearman, mean PSNR": float(spearmanr(predicted, np.log(true).mean(1)).statistic),
    }


def reliability(true: np.ndarray) -> dict[str, float]:
    """Rank correlation of the true errors of one half of the images with those of the other half."""
    one, other = true[:, ::2], true[:, 1::2]
    return {
        "mean square error": float(spearmanr(one.mean(1), other.mean(1)).statistic),
        "mean PSNR": float(spearmanr(np.log(one).mean(1), np.log(other).mean(1)).statistic),
    }


def main() -> None:
    """Measure the truth, then predict it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="digits")
    parser.add_argument("--plans", type=int, default=60)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = Records(f"drift-{args.model}", vars(args))
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(args.model, args.steps, Path(folder))
        plans = random_plans(setting.candidates["min-max"], args.plans)
        tables = tables_of(records, setting)
        true = true_errors(setting, plans, args.images, records)
    found = {name: compared(values, true) for name, values in predictions(plans, tables).items()}
    records.put("reliability of the truth", reliability(true))
    records.put("predictions", found)
    print(json.dumps({key: records.data[key] for key in ("reliability of the truth", "predictions")}, indent=1))


if __name__ == "__main__":
    main()
