import pytest
import torch
from denoisers import sampler, tiny_denoiser

import dq_plugins as dq
from dq_plugins.errors import RecipeError
from dq_plugins.recipe import Recipe, Step

SCHEDULE = (901.0, 601.0, 301.0, 1.0)
IMAGES = 4


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()

    def sample(model) -> None:
        for seed in range(IMAGES):
            sampler(1, seed, SCHEDULE)(model)

    return denoiser, dq.record(denoiser, sample, out=tmp_path_factory.mktemp("calib"), progress=False)


def plan_with(case, then=(), workdir=None, **options) -> dq.QuantPlan:
    recipe = Recipe("r", "", (Step("weight-ranges"), Step("calibration-timesteps", options), *then))
    return dq.make_plan(*case, recipe, act_bits=4, progress=False, workdir=workdir)


def section(plan: dq.QuantPlan) -> dict:
    return plan.sections["calibration-timesteps"].data


def test_every_timestep_is_seen_once_before_any_is_seen_again(case) -> None:
    assert plan_with(case, calls=4).calibration_calls.visits == (1,) * 4
    assert section(plan_with(case, calls=4))["stopped"] == "limit"


def test_drawing_stops_when_the_expected_gain_is_small(case) -> None:
    plan = plan_with(case, threshold=1.9, groups=3)
    found = section(plan)
    assert found["stopped"] == "expected gain"
    assert sum(plan.calibration_calls.visits) == len(found["gain"]) < IMAGES * len(SCHEDULE)
    assert all(gain >= 1.9 for gain in found["gain"])


def test_a_threshold_of_nothing_draws_everything(case) -> None:
    plan = plan_with(case, threshold=0.0)
    assert plan.calibration_calls.visits == (IMAGES,) * 4
    assert section(plan)["stopped"] == "no call left"


def test_later_passes_see_what_was_drawn_and_nothing_else(case, tmp_path) -> None:
    then = (Step("timestep-groups", {"groups": 2}), Step("activation-ranges"))
    plan = plan_with(case, then, calls=6)
    calls = plan.calibration_calls
    drawn = case[1].subset(per_timestep=dict(zip(calls.timesteps, calls.visits, strict=True)))
    assert len(drawn) == 6
    recipe = Recipe("r", "", (Step("weight-ranges"), *then))
    alone = dq.make_plan(case[0], drawn, recipe, act_bits=4, progress=False)
    for name, layer in alone.layers.items():
        assert torch.equal(layer.activation.scale, plan.layers[name].activation.scale)


def test_a_run_resumed_after_the_drawing_sees_the_same_calls(case, tmp_path, monkeypatch) -> None:
    from dq_plugins.passes.ranges.timestep_groups import TimestepGrouping

    then = (Step("timestep-groups", {"groups": 2}), Step("activation-ranges"))
    monkeypatch.setattr(TimestepGrouping, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        plan_with(case, then, tmp_path, calls=6)
    monkeypatch.undo()
    assert plan_with(case, then, tmp_path, calls=6) == plan_with(case, then, calls=6)


def test_fewer_calls_than_timesteps_are_refused(case) -> None:
    with pytest.raises(RecipeError, match="each has to be seen once"):
        plan_with(case, calls=3)


def test_without_activation_bits_nothing_is_drawn(case) -> None:
    recipe = Recipe("r", "", (Step("weight-ranges"), Step("calibration-timesteps")))
    plan = dq.make_plan(*case, recipe, act_bits=None, progress=False)
    assert "skipped" in section(plan)
    assert plan.calibration_calls is None
