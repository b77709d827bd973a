"""ADP-DM's recipe (Wang et al., CVPR 2024, arXiv 2305.18723), as the paper states it.

Eight groups; entropy weight 0.8 against the squared error of the noise summed over an image; eta 1.5; weights min-max
and nearest. Whatever any timesteps have in common makes a group (``contiguous`` off), and what the search finds is
kept, better or not. The released code does something else: it groups channels, not timesteps, and keeps the mixture.
"""

from __future__ import annotations

from dq_plugins.recipe import Recipe, Step

ADP_DM = Recipe(
    "adp-dm",
    "ADP-DM: calls drawn where timesteps are undecided; timestep groups learned against the denoiser's output",
    (
        Step("weight-ranges", {"method": "minmax"}),
        Step("calibration-timesteps", {"groups": 8, "eta": 1.5}),
        Step(
            "timestep-groups",
            {
                "method": "search",
                "groups": 8,
                "start": "scratch",
                "contiguous": False,
                "loss": "denoiser",
                "entropy": 0.8,
                "entropy_scale": "absolute",
                "merge": 0.0,
                "keep_better": False,
            },
        ),
        Step("activation-ranges"),
    ),
)
