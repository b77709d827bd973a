"""Ours: the recipes, in integers through torchao. What is called full precision is the denoiser itself."""

from __future__ import annotations

from functools import partial

import dq_plugins as dq
from benchmarks.peers import Method, Quantized, Setting, Widths
from dq_plugins.metrics.size import state_bytes

REQUIREMENTS: tuple[str, ...] = ()
EVERY: tuple[Widths, ...] = ((8, 8), (4, 8), (4, 4), (4, None))


def by_recipe(setting: Setting, recipe: str) -> Quantized:
    """Planned by a recipe, put into torchao."""
    weight_bits, act_bits = setting.widths
    plan = dq.make_plan(
        setting.denoiser,
        setting.calibration,
        recipe=recipe,
        weight_bits=weight_bits,
        act_bits=act_bits,
        seed=setting.seed,
        progress=False,
    )
    denoiser = dq.apply(setting.denoiser, plan, backend="torchao")
    return Quantized(denoiser, state_bytes(denoiser))


def full_precision(setting: Setting) -> Quantized:
    """As it is."""
    return Quantized(setting.denoiser, state_bytes(setting.denoiser))


METHODS = {"full precision": Method(full_precision, ((32, 32),), "fp32")} | {
    f"ours, {recipe}": Method(partial(by_recipe, recipe=recipe), EVERY, "integer")
    for recipe in ("fast", "default", "best")
    if recipe in dq.names("recipe")
}
