from __future__ import annotations

from pathlib import Path

import pytest
import torch
from denoisers import recorded, tiny_denoiser

import dq_plugins as dq
from dq_plugins.passes.width_candidates import candidates_of
from dq_plugins.recipe import PassContext, Recipe, Step

STEPS = (
    Step("weight-ranges", {"method": "minmax"}),
    Step("timestep-groups", {"groups": 2}),
    Step("activation-ranges", {"observer": "minmax"}),
)


@pytest.mark.parametrize("symmetric", [True, False])
def test_candidates_at_the_widths_of_the_plan_are_its_own_quantizers(tmp_path: Path, symmetric: bool) -> None:
    denoiser = tiny_denoiser()
    calls = recorded(denoiser, tmp_path)
    plan = dq.make_plan(
        denoiser, calls, Recipe("r", "", STEPS), symmetric_weights=symmetric, symmetric_acts=symmetric, progress=False
    )
    found = candidates_of(plan, PassContext(denoiser, calls, plan.targets), (4, 8), (4, 8))
    for name, layer in plan.layers.items():
        weight, activation = found.weights[name][8], found.activations[name][8]
        assert torch.equal(weight.scale, layer.weight.scale)
        assert weight.symmetric == layer.weight.symmetric == symmetric
        assert torch.equal(activation.scale, layer.activation.scale)
        assert torch.equal(activation.zero_point, layer.activation.zero_point)


def test_candidates_keep_the_ranges_that_groups_share(tmp_path: Path) -> None:
    denoiser = tiny_denoiser()
    calls = recorded(denoiser, tmp_path)
    plan = dq.make_plan(denoiser, calls, Recipe("r", "", STEPS), progress=False)
    plan.shared_rows["default"] = (0, 0)
    found = candidates_of(plan, PassContext(denoiser, calls, plan.targets), (8,), (8,))
    for widths in found.activations.values():
        assert widths[8].scale[0] == widths[8].scale[1]
