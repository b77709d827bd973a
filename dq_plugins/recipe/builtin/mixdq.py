"""MixDQ's recipe."""

from __future__ import annotations

from dq_plugins.recipe import Recipe, Step

MIXDQ = Recipe(
    "mixdq",
    "MixDQ: bits where measurement says they matter, by an exact program; outlier text tokens computed exactly",
    (
        Step("weight-ranges"),
        Step("timestep-groups"),
        Step("activation-ranges"),
        Step("bos-tokens"),
        Step("sensitivity"),
        Step("bit-allocation"),
    ),
)
