"""TMPQ-DM's recipe."""

from __future__ import annotations

from dq_plugins.recipe import Recipe, Step

TMPQ = Recipe(
    "tmpq",
    "TMPQ-DM: fewer timesteps and fewer bits, chosen together within one budget",
    (
        Step("weight-ranges"),
        Step("timestep-groups"),
        Step("activation-ranges"),
        Step("sensitivity"),
        Step("timestep-reduction"),
    ),
)
