"""Layers that mix t with conditions: reconstructed, frozen and ranged like the temporal block."""

import pytest
import torch
from denoisers import SCHEDULE, class_denoiser, recorded_classes

import dq_plugins as dq
from dq_plugins.passes.temporal.finite_set_ranges import GROUPS
from dq_plugins.recipe import Recipe, Step

MIXED = ("body.0.beta", "body.1.beta")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = class_denoiser()
    return denoiser, recorded_classes(denoiser, tmp_path_factory.mktemp("calib"))


def plan_of(case, *steps: Step, **options) -> dq.QuantPlan:
    denoiser, calibration = case
    recipe = Recipe("test", "", (Step("weight-ranges"), *steps))
    return dq.make_plan(denoiser, calibration, recipe, weight_bits=4, progress=False, **options)


def test_reconstructed_over_every_recorded_class(case) -> None:
    plan = plan_of(case, Step("temporal-reconstruction", {"iterations": 300, "conditions": 32}))
    found = plan.sections["temporal-reconstruction"].data
    assert found["layers"] == ["body.0.beta", "body.1.beta", "p", "q"]
    assert found["points"] == {"timesteps": len(SCHEDULE), "conditions": 3}
    assert found["after"]["cosine"] <= 0.4 * found["before"]["cosine"]


def test_are_left_to_their_blocks_by_default(case) -> None:
    plan = plan_of(case, Step("temporal-reconstruction", {"iterations": 20}))
    assert plan.sections["temporal-reconstruction"].data["layers"] == ["p", "q"]


def test_block_reconstruction_leaves_them_as_decided(case) -> None:
    temporal = Step("temporal-reconstruction", {"iterations": 60, "conditions": 32})
    alone = plan_of(case, temporal)
    both = plan_of(case, temporal, Step("block-reconstruction", {"iterations": 10, "calls": 4}))
    blocks = plan_of(case, Step("block-reconstruction", {"iterations": 60, "calls": 4, "freeze_temporal": False}))
    for name in MIXED:
        assert torch.equal(both.layers[name].weight.codes, alone.layers[name].weight.codes)
        assert blocks.layers[name].weight.codes is not None
    assert not all(torch.equal(blocks.layers[n].weight.codes, alone.layers[n].weight.codes) for n in MIXED)
    assert set(both.sections["block-reconstruction"].data["frozen"]) == {*MIXED, "p", "q"}


def test_one_range_per_timestep_over_all_classes(case) -> None:
    denoiser, _ = case
    plan = plan_of(case, Step("finite-set-ranges", {"quantized_weights": False, "conditions": 32}))
    seen: list[torch.Tensor] = []
    handle = denoiser.body[0].beta.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    for t in SCHEDULE:
        seen.clear()
        for label in range(3):
            denoiser(torch.zeros(1, 2, 8, 8), torch.tensor([t]), torch.tensor([label]))
        x, quant = torch.cat(seen), plan.layers["body.0.beta"].activation
        step = (x.max().clamp_min(0) - x.min().clamp_max(0)) / 255
        assert quant.groups == GROUPS
        torch.testing.assert_close(quant.scale[plan.groups[GROUPS].of(t)], step, rtol=1e-4, atol=0)
    handle.remove()
