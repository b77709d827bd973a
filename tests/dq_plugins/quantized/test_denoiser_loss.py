from functools import partial
from math import log
from statistics import geometric_mean

import odes
import pytest
import torch
from denoisers import SCHEDULE, recorded, tiny_denoiser

import dq_plugins as dq
from dq_plugins.quantized.denoiser_loss import DenoiserLoss, divided
from dq_plugins.quantized.run import planned_run, planned_states
from dq_plugins.recipe import Recipe, Step

STEPS = (Step("weight-ranges"), Step("activation-ranges"))


def loss_of(denoiser, calibration, images: int = 2):
    """The loss of a plan of 4 bits, open, and its states."""
    plan = dq.make_plan(denoiser, calibration, Recipe("r", "", STEPS), weight_bits=4, act_bits=4, progress=False)
    run = planned_run(denoiser, plan, whole=True)
    states = planned_states(run, plan)
    with run:
        loss = DenoiserLoss(run, calibration, "sample", states, images, torch.Generator().manual_seed(0))
    return run, states, loss


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    calibration = recorded(denoiser, tmp_path_factory.mktemp("calls"), batch=8)
    return calibration, *loss_of(denoiser, calibration)


@torch.no_grad()
def errors(run, states, calibration, t: float, image: int) -> float:
    call = calibration.call(t, 0).rows(torch.tensor([image]), 8)
    run.use(states)
    return float((call.run(run.denoiser) - call.output).square().mean())


def test_an_image_counts_by_the_share_of_its_own_error(case) -> None:
    calibration, run, states, loss = case
    halved = {name: states[name] for name in list(states)[: len(states) // 2]}
    assert loss.probes == 2
    with run:
        started = {(t, i): errors(run, states, calibration, t, i) for t in SCHEDULE for i in (6, 7)}
        weights = {t: geometric_mean([started[t, 6], started[t, 7]]) for t in SCHEDULE}
        for probe, image in enumerate((6, 7)):
            shares = [weights[t] * errors(run, halved, calibration, t, image) / started[t, image] for t in SCHEDULE]
            assert float(loss.judge(halved, probe)) == pytest.approx(sum(shares) / sum(weights.values()), rel=1e-4)
            assert float(loss.judge(states, probe)) == pytest.approx(1, rel=1e-5)


def test_a_pass_learns_from_every_image_that_does_not_judge_once(case) -> None:
    calibration, run, states, loss = case
    with run:
        found = sum(float(loss.learn(states, i)) for i in range(loss.per_pass))
        weights = {t: geometric_mean(errors(run, states, calibration, t, i) for i in (6, 7)) for t in SCHEDULE}
        mean = sum(weights.values()) / len(weights)
        logs = [weights[t] / mean * log(errors(run, states, calibration, t, i)) / 2 for t in SCHEDULE for i in range(6)]
    assert loss.per_pass == 3 * len(SCHEDULE)  # six images, two an iteration
    assert found == pytest.approx(sum(logs), rel=1e-4)


def test_learning_does_not_make_the_others_pay_for_a_loud_image(tmp_path) -> None:
    def sample(denoiser, loud: float = 10.0, seed: int = 0) -> None:
        x = 8 * torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
        x[1] *= loud
        for t in SCHEDULE:
            denoiser(sample=x, timestep=torch.full((8,), t))

    denoiser = tiny_denoiser()
    calibration = dq.record(denoiser, sample, tmp_path / "loud", progress=False)
    others = dq.record(denoiser, partial(sample, loud=1.0, seed=1), tmp_path / "others", progress=False)
    options = {"passes": 16.0, "images": 6, "learning_rate": 3e-2, "learn": ("ranges", "scales", "corrections")}
    steps = Step("weight-ranges"), Step("activation-ranges", {"observer": "minmax"})
    widths = {"weight_bits": 4, "act_bits": 4, "edge_bits": 4}
    start, plan = (
        dq.make_plan(denoiser, calibration, Recipe("r", "", each), **widths, progress=False)
        for each in (steps, (*steps, Step("learned-ranges", options)))
    )
    assert not plan.sections["learned-ranges"].data["losses"]["denoiser"]["kept_start"]
    before, after = (squared_error(dq.apply(denoiser, each, backend="simulate"), others) for each in (start, plan))
    assert after < 0.3 * before  # 0.6 where the loss is a plain mean


@torch.no_grad()
def squared_error(model, calibration) -> float:
    return sum(float((call.run(model) - call.output).square().sum()) for call in calibration.calls())


@pytest.mark.parametrize("guided", [False, True])
def test_no_row_of_an_image_that_judges_is_learned_from(guided: bool, tmp_path) -> None:
    calibration = odes.recorded(odes.velocity(), "flow", tmp_path, guided)
    for t in calibration.timesteps:
        learned, judged = divided(calibration, t, "sample")
        seen = torch.cat([part.call(calibration, t).kwargs["sample"] for part in learned])
        for part in judged:
            held_out = part.call(calibration, t).kwargs["sample"]
            assert len(held_out) == (2 if guided else 1)
            assert all((seen - row).abs().amax(dim=(1, 2, 3)).min() > 0 for row in held_out)
