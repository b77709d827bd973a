"""Plans of a bundled denoiser at every pair of widths, for `benchmarks.size`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

import dq_plugins as dq
from dq_plugins.bundled_denoisers import bundled
from dq_plugins.demo import PROMPTS
from dq_plugins.recipe import Recipe, Step

WIDTHS: dict[str, tuple[int, int | None]] = {
    f"W{w}A{a}": (w, a) for w, a in ((8, 8), (8, 6), (8, 4), (4, 8), (4, 6), (4, 4), (3, 8), (2, 8), (1, 8))
} | {f"W{w}, floating activations": (w, None) for w in (8, 4, 3, 2, 1)}

CALIBRATION_IMAGES, HELD_OUT_IMAGES, STEPS = 16, 4, 10


class Bundled:
    """A bundled denoiser, calls to calibrate on, and calls with other seeds to measure on."""

    def __init__(self, name: str, folder: Path) -> None:
        adapter = dq.get("adapter", "diffusers")()
        pipe = adapter.load_pipeline(bundled(name))
        conditions: dict[str, Any] = {"prompts": PROMPTS[name]} if name in PROMPTS else {}

        def record(images: int, seed: int, out: str) -> dq.CalibrationSet:
            sampler = adapter.sampler(pipe, **conditions, steps=STEPS, seed=seed, images=images, batch=8)
            return dq.record(self.denoiser, sampler, folder / out, progress=False)

        self.denoiser: nn.Module = adapter.denoiser_of(pipe)[1].eval().requires_grad_(False)
        self.calibration = record(CALIBRATION_IMAGES, 0, "calibration")
        self.held_out = record(HELD_OUT_IMAGES, 77, "held-out")

    def plan(self, recipe: Recipe | str, weight_bits: int, act_bits: int | None) -> dq.QuantPlan:
        """A plan at these widths."""
        bits: dict[str, Any] = {"weight_bits": weight_bits, "act_bits": act_bits}
        return dq.make_plan(self.denoiser, self.calibration, recipe=recipe, progress=False, **bits)

    def plans(self, recipe: str) -> Iterator[tuple[str, dq.QuantPlan]]:
        """By pair of widths. Ranges of activations do not depend on the weights, so each is made once."""
        weights = {bits: self.plan(weight_recipe(bits), bits, None) for bits in (8, 4, 3, 2, 1)}
        activations = {bits: self.plan(recipe, 8, bits) for bits in (8, 6, 4)}
        for label, (weight_bits, act_bits) in WIDTHS.items():
            plan = copy.deepcopy(weights[weight_bits] if act_bits is None else activations[act_bits])
            for name, layer in plan.layers.items():
                source = weights[weight_bits].layers[name]
                layer.weight = source.weight
                layer.unquantized_reason = layer.unquantized_reason or (
                    None if layer.weight else source.unquantized_reason
                )
            yield label, plan.validate()


def weight_recipe(bits: int) -> Recipe:
    """Rounding to nearest: signs at one bit, the scale of least error at more."""
    return Recipe("weights", "", (Step("binarize" if bits == 1 else "weight-ranges"),))
