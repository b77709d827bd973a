import pytest
import torch
from denoisers import recorded, tiny_denoiser

import dq_plugins as dq
from dq_plugins import registry
from dq_plugins.passes.temporal.block import TemporalBlock
from dq_plugins.plan import WeightQuant
from dq_plugins.recipe import Pass, Recipe, Step

SCHEDULE = tuple(float(t) for t in range(951, 0, -100))


def plan_with(tmp_path, seed: int, *steps: Step, **options) -> tuple[torch.nn.Module, dq.QuantPlan]:
    denoiser = tiny_denoiser(seed)
    calibration = recorded(denoiser, tmp_path / f"calib-{seed}", schedule=SCHEDULE)
    recipe = Recipe("test", "", (Step("weight-ranges"), *steps))
    return denoiser, dq.make_plan(denoiser, calibration, recipe, progress=False, **options)


@pytest.mark.parametrize("seed", range(3))
def test_feature_error_falls_far_below_nearest_rounding(tmp_path, seed: int) -> None:
    _, plan = plan_with(
        tmp_path, seed, Step("temporal-reconstruction", {"iterations": 400}), weight_bits=4, act_bits=None
    )
    found = plan.sections["temporal-reconstruction"].data
    assert found["after"]["cosine"] <= 0.4 * found["before"]["cosine"]
    assert found["after"]["relative"] < found["before"]["relative"]
    assert found["after"]["mismatch"] == 0


def test_only_the_temporal_block_gets_codes(tmp_path) -> None:
    _, plan = plan_with(tmp_path, 0, Step("temporal-reconstruction", {"iterations": 20}), weight_bits=3)
    assert {n for n, layer in plan.layers.items() if layer.weight.codes is not None} <= {
        "p",
        "q",
        "body.0.beta",
        "body.1.beta",
    }


def test_quantized_layers_that_do_not_learn_stay_quantized_while_others_do(tmp_path, monkeypatch) -> None:
    class SignsInTheMiddle(Pass):
        name = "signs-in-the-middle"

        def run(self, plan, context) -> None:
            weight = context.denoiser.q.weight
            plan.layers["q"].weight = WeightQuant(1, weight.abs().mean(1), scheme="binary")

    seen: list[torch.Tensor] = []
    features = TemporalBlock.features

    def remembered(self, inputs, weights=None):
        if weights is not None and weights["p.weight"].requires_grad:
            seen.append(weights["q.weight"])
        return features(self, inputs, weights)

    monkeypatch.setattr(TemporalBlock, "features", remembered)
    steps = Step("signs-in-the-middle"), Step("temporal-reconstruction", {"iterations": 3})
    with registry.temporary("pass", SignsInTheMiddle.name, SignsInTheMiddle):
        denoiser, plan = plan_with(tmp_path, 0, *steps, weight_bits=4)
    assert plan.sections["temporal-reconstruction"].data["layers"] == ["body.0.beta", "body.1.beta", "p"]
    assert len(seen) == 3
    signs = plan.layers["q"].weight.fake_quantize(denoiser.q.weight)
    assert all(torch.equal(weight, signs) for weight in seen)


def test_same_seed_same_plan(tmp_path) -> None:
    steps = Step("temporal-reconstruction", {"iterations": 30, "batch": 3})
    plans = [plan_with(tmp_path / str(i), 0, steps, weight_bits=4)[1] for i in range(2)]
    assert plans[0] == plans[1]
    recipe = Recipe("test", "", (Step("weight-ranges"), steps))
    denoiser = tiny_denoiser(0)
    calibration = recorded(denoiser, tmp_path / "other", schedule=SCHEDULE)
    assert plans[0] != dq.make_plan(denoiser, calibration, recipe, weight_bits=4, seed=1, progress=False)


def test_a_hundred_sign_steps_do_better_than_the_relaxation_in_as_many(tmp_path) -> None:
    def error(name: str, **options) -> float:
        step = Step("temporal-reconstruction", {"iterations": 100, **options})
        found = plan_with(tmp_path / name, 0, step, weight_bits=4, act_bits=None)[1].sections["temporal-reconstruction"]
        return found.data["after"]["relative"] / found.data["before"]["relative"]

    assert error("sign", preset="sign") < min(0.5, error("relaxation"))


def test_paper_preset_is_the_papers() -> None:
    settings = dq.get("pass", "temporal-reconstruction")(preset="paper").method
    assert (settings.iterations, settings.learning_rate, settings.weight) == (20_000, 1e-3, 0.01)
    assert (settings.beta_start, settings.beta_end, settings.warmup) == (20.0, 2.0, 0.2)
