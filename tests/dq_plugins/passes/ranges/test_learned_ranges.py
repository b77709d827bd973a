from copy import deepcopy

import pytest
import torch
from denoisers import loud_where_it_does_not_matter, recorded, tiny_denoiser

import dq_plugins as dq
from dq_plugins.passes.ranges import learned_ranges
from dq_plugins.quantized import resuming
from dq_plugins.quantized.denoiser_loss import divided
from dq_plugins.quantized.learner import Learner
from dq_plugins.recipe import Recipe, Step
from dq_plugins.sensitivity.exact_noise import replayed_errors
from dq_plugins.sensitivity.trajectory import trajectories_of

BASE = Step("weight-ranges"), Step("timestep-groups", {"groups": 2}), Step("activation-ranges")
EVERYTHING = ("ranges", "scales", "corrections")


def recorded_case(folder, denoiser, batch: int = 8):
    return denoiser, recorded(denoiser, folder, batch=batch)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return recorded_case(tmp_path_factory.mktemp("calib"), tiny_denoiser())


@pytest.fixture(scope="module")
def large_case(tmp_path_factory):
    """With four images that judge instead of two, a small gain can be told from chance."""
    return recorded_case(tmp_path_factory.mktemp("large"), tiny_denoiser(), batch=16)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return recorded_case(tmp_path_factory.mktemp("planted"), loud_where_it_does_not_matter())


def make(case, *steps: Step, **options) -> dq.QuantPlan:
    widths = {"weight_bits": 4, "act_bits": 4, "edge_bits": 4} | options
    return dq.make_plan(*case, Recipe("r", "", steps), progress=False, **widths)


def learned(case, before=BASE, workdir=None, widths=None, **options):
    given = {"passes": 16.0, "images": 6, "learning_rate": 3e-2, "runs": 0} | options
    return make(case, *before, Step("learned-ranges", given), workdir=workdir, **widths or {})


def losses(plan: dq.QuantPlan) -> dict[str, dict[str, float]]:
    return plan.sections["learned-ranges"].data["losses"]


@torch.no_grad()
def error(case, plan: dq.QuantPlan, seed: int | None = None, folder=None) -> float:
    """Squared error of outputs over their square, on the images held out, or on images of another seed."""
    denoiser, calibration = case
    model = dq.apply(deepcopy(denoiser), plan, backend="simulate")
    if seed is None:
        calls = [
            part.call(calibration, t) for t in calibration.timesteps for part in divided(calibration, t, "sample")[1]
        ]
    else:
        calls = list(recorded(denoiser, folder, batch=4, seed=seed).calls())
    noise = sum(float((call.run(model) - call.output).square().sum()) for call in calls)
    return noise / sum(float(call.output.square().sum()) for call in calls)


@pytest.mark.parametrize("target", ["denoiser", "block"])
def test_ranges_find_out_which_values_count(planted, target: str, tmp_path) -> None:
    wide = {"weight_bits": 8, "edge_bits": 8}
    start, plan = make(planted, *BASE, **wide), learned(planted, target=target, widths=wide)
    for seed in (1, 2):
        before, after = (error(planted, each, seed, tmp_path / f"{seed}") for each in (start, plan))
        assert after < 0.8 * before


def test_what_is_learned_for_nothing_is_thrown_away(case) -> None:
    start, plan = make(case, *BASE), learned(case, learning_rate=1.0, passes=1.0, looks=1)
    assert losses(plan)["denoiser"]["kept_start"]
    for name, layer in start.layers.items():
        assert torch.equal(layer.activation.scale, plan.layers[name].activation.scale)


@pytest.mark.parametrize(
    ("learn", "rate"), [("ranges", 3e-3), ("scales", 1e-2), ("corrections", 3e-3), ("rounding", 3e-3)]
)
def test_each_thing_can_be_learned_alone_and_helps(large_case, learn: str, rate: float) -> None:
    case, how = large_case, {"passes": 8.0, "images": 2, "learning_rate": rate, "rounding_rate": 1e-2}
    start, plan = make(case, *BASE), learned(case, learn=(learn,), **how)
    assert error(case, plan) < error(case, start)
    changed = {
        "ranges": lambda layer: layer.activation.scale,
        "scales": lambda layer: layer.weight.scale,
        "corrections": lambda layer: layer.bias_correction and layer.bias_correction.values,
        "rounding": lambda layer: None if learn == "scales" else layer.weight.codes,  # codes of scales are stored
    }
    for what, part in changed.items():
        same = [_equal(part(layer), part(plan.layers[name])) for name, layer in start.layers.items()]
        assert all(same) == (what != learn)


def _equal(a, b) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def test_balance_gptq_and_corrections_come_before(planted) -> None:
    before = Step("channel-balance", {"least_gain": 0.0}), BASE[0], Step("gptq", {"calls": 5}), *BASE[1:]
    before = (*before, Step("bias-correction"))
    start, plan = make(planted, *before), learned(planted, before, learn=EVERYTHING, learning_rate=1e-2)
    assert any(layer.balance is not None for layer in plan.layers.values())
    for name, layer in start.layers.items():
        assert torch.equal(layer.weight.codes, plan.layers[name].weight.codes)
    assert error(planted, plan) < error(planted, start)


def test_wider_inputs_keep_their_ranges(case) -> None:
    start, plan = make(case, *BASE), learned(case, most_bits=3, learn=("ranges", "corrections"), passes=1.0)
    assert not plan.learned_ranges
    for name, layer in start.layers.items():
        assert torch.equal(layer.activation.scale, plan.layers[name].activation.scale)


@pytest.mark.parametrize("target", ["denoiser", "block"])
def test_resumes_to_the_same_plan(case, target: str, tmp_path, monkeypatch) -> None:
    options = {"target": target, "learn": EVERYTHING, "passes": 6.0}
    step, done = Learner._step, []
    monkeypatch.setattr(Learner, "_step", lambda self, i, *rest: (step(self, i, *rest), done.append(i))[0])
    whole = learned(case, **options)
    expected, counting = list(done), Learner._step
    done.clear()

    def interrupted(self, *rest):
        if len(done) == 18:
            raise KeyboardInterrupt
        return counting(self, *rest)

    monkeypatch.setattr(resuming, "KEPT_EVERY_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            learned(case, workdir=tmp_path, **options)
    assert learned(case, workdir=tmp_path, **options) == whole
    assert done == expected


def test_the_denoiser_is_left_as_it_was(case) -> None:
    learned(case, passes=1.0)
    assert not any(module._forward_pre_hooks for module in case[0].modules())
    assert not any(parameter.requires_grad for parameter in case[0].parameters())


def image_error(case, plan: dq.QuantPlan) -> torch.Tensor:
    """Of every image of the recorded runs, sampled again."""
    model = dq.apply(deepcopy(case[0]), plan, backend="simulate")
    return replayed_errors(model, trajectories_of(case[1], "sample"))


def test_what_is_learned_must_make_images_better(planted):
    before, free = make(planted, *BASE), learned(planted)
    strict = learned(planted, runs=2)
    found, kept = losses(strict)["denoiser"], not losses(strict)["denoiser"]["kept_start"]
    shares = (image_error(planted, free) / image_error(planted, before)).log()
    assert found["images"] == pytest.approx(float(shares.mean().exp()), rel=1e-4)
    assert kept == bool(-shares.mean() > shares.std() / len(shares) ** 0.5)
    assert torch.equal(image_error(planted, strict), image_error(planted, free if kept else before))


def test_better_calls_and_worse_images_are_not_kept(planted, monkeypatch):
    """The plan comes out as it was, though single calls got better."""
    found = iter([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.9, 2.2, 3.9])])  # of before, and of learned
    monkeypatch.setattr(learned_ranges, "image_errors", lambda *_: next(found))
    plan, before = learned(planted, runs=1), make(planted, *BASE)
    assert losses(plan)["denoiser"]["learned"] < losses(plan)["denoiser"]["start"]
    assert losses(plan)["denoiser"]["images"] == pytest.approx((0.9 * 1.1 * 1.3) ** (1 / 3))
    assert losses(plan)["denoiser"]["kept_start"] is True
    assert image_error(planted, plan).tolist() == image_error(planted, before).tolist()


def test_a_recording_without_whole_runs_has_no_images_to_ask(planted):
    plan = learned((planted[0], planted[1].spread(3)), runs=2)
    assert "images" not in losses(plan)["denoiser"]
