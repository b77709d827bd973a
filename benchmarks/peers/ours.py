"""Ours: the recipes, in integers through torchao."""

from __future__ import annotations

from functools import partial

import dq_plugins as dq
from benchmarks.peers import Method, Quantized, Setting
from dq_plugins.metrics.size import state_bytes

REQUIREMENTS: tuple[str, ...] = ()
EVERY = ("W8A8", "W4A8", "W4A4", "W4")


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


METHODS = {
    "ours, mixdq": Method(partial(by_recipe, recipe="mixdq"), ("mean-4",), "integer"),
    "ours, mixed-precision": Method(partial(by_recipe, recipe="mixed-precision"), ("mean-4",), "integer"),
    **{
        f"ours, {name}": Method(partial(by_recipe, recipe=name), EVERY, "integer")
        for name in ("fast", "default", "best")
    },
    "ours, low-bit": Method(partial(by_recipe, recipe="low-bit"), ("W4A8", "W4A4", "W4"), "integer"),
}
