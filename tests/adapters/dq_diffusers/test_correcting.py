"""A planted problem: a denoiser that says what its scheduler wants to hear, and whose quantized self is off by k(t)."""

from __future__ import annotations

import copy
import inspect
import json
from types import SimpleNamespace

import diffusers
import pytest
import torch
from dq_diffusers import correct_sampler
from dq_diffusers.correcting import FITTED, NOISY, step_responses
from dq_diffusers.recording import NON_FINITE
from torch import nn

import dq_plugins as dq
from dq_plugins.errors import CalibrationError, PlanError, RecipeError, TimestepError
from dq_plugins.passes.correction.sampler_correction import CorrectionFindings, Fitted, SamplerCorrecting, _noise
from dq_plugins.plan import QuantPlan, SamplerCorrection, WeightQuant
from dq_plugins.recipe import PassContext, Recipe, Step

STEPS = 5


def config_of(scheduler):
    """As recordings keep it."""
    return json.loads(scheduler.to_json_string(), parse_constant=lambda name: {NON_FINITE: name})


class Planted(nn.Module):
    """``y = tanh(x) (1 + f(t) (w - 1))``: with ``w`` quantized to 1.2 the output is ``1 + 0.2 f(t)`` times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.layer.weight, 1.0)

    def forward(self, sample, timestep):
        t = torch.as_tensor(timestep).reshape(-1, *[1] * (sample.dim() - 1)).to(sample) / 1000
        y = sample.tanh()
        return y + t * (self.layer(y[..., None])[..., 0] - y)


class Sampling:
    """Samples with a stock scheduler, and says which."""

    def __init__(self, name: str, batches: int = 2, described: bool = True, **config) -> None:
        self.scheduler, self.batches = getattr(diffusers, name)(**config), batches
        found = {"adapter": "diffusers", "scheduler": config_of(self.scheduler), "guidance": None}
        if described:
            self.description = found

    def __call__(self, model: nn.Module, scheduler=None) -> torch.Tensor:
        scheduler, images = scheduler or copy.deepcopy(self.scheduler), []
        for batch in range(self.batches):
            scheduler.set_timesteps(STEPS)
            draw = torch.Generator().manual_seed(batch)
            x = torch.randn(4, 1, 8, 8, generator=draw) * scheduler.init_noise_sigma
            extra = {"generator": draw} if "generator" in inspect.signature(scheduler.step).parameters else {}
            for t in scheduler.timesteps:
                scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                out = model(sample=scaled, timestep=t.expand(len(x)))
                x = scheduler.step(out, t, x, **extra).prev_sample
            images.append(x)
        return torch.cat(images)


def planned(denoiser, sampling, folder, **options) -> QuantPlan:
    """A plan whose only weight is 1.2 instead of 1."""
    calibration = dq.record(denoiser, sampling, out=folder, progress=False)
    plan = dq.make_plan(denoiser, calibration, Recipe("r", "", (Step("weight-ranges"),)), act_bits=None, progress=False)
    plan.layers["layer"].weight = WeightQuant(4, torch.tensor([1.2]))
    list(SamplerCorrecting(**options).run(plan, PassContext(denoiser, calibration)))
    return plan


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_planted_gains_are_found_and_taken_away(name, tmp_path):
    denoiser, sampling = Planted().eval().requires_grad_(False), Sampling(name)
    plan = planned(denoiser, sampling, tmp_path / "calib")
    found = plan.sampler_correction
    assert found.sampler == name
    assert found.gain == pytest.approx([0.2 * t / 1000 for t in found.timesteps], rel=1e-4)
    assert set(found.noise) == {0.0}
    assert QuantPlan.load(plan.save(tmp_path / "plan")) == plan
    said = plan.sections["sampler-correction"].read(CorrectionFindings, "")
    assert said.strength == 1.0
    expected, quantized = sampling(denoiser), dq.apply(denoiser, plan, "simulate")
    pipe = correct_sampler(SimpleNamespace(scheduler=copy.deepcopy(sampling.scheduler)), plan)
    plain, corrected = sampling(quantized), sampling(quantized, pipe.scheduler)
    assert (corrected - expected).square().mean() < 1e-6 * (plain - expected).square().mean()
    again = sampling(quantized, copy.deepcopy(pipe.scheduler))
    assert torch.equal(again, corrected)
    assert inspect.signature(pipe.scheduler.step) == inspect.signature(sampling.scheduler.step)


@pytest.mark.parametrize("name", sorted(NOISY))
def test_responses_of_noisy_samplers_are_those_of_their_steps(name):
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(STEPS)
    config = json.loads(scheduler.to_json_string())
    found = step_responses(config, [float(t) for t in scheduler.timesteps])
    x = torch.randn(8, 1, 64, 64, generator=torch.Generator().manual_seed(5)) * 1e-3
    for t, (response, noise) in zip(scheduler.timesteps, found, strict=True):
        before, other = copy.deepcopy(scheduler), torch.randn(x.shape) * 1e-3
        one = scheduler.step(x, t, x, generator=torch.Generator().manual_seed(1)).prev_sample
        two = before.step(x + other, t, x, generator=torch.Generator().manual_seed(1)).prev_sample
        torch.testing.assert_close(two - one, response * other, rtol=1e-3, atol=1e-5)
        assert float(one.std()) == pytest.approx(noise, rel=0.02, abs=2e-2)
    assert max(noise for _, noise in found) > 0.05


@pytest.mark.parametrize("name", sorted(NOISY))
@pytest.mark.parametrize("each", [False, True])
def test_less_noise_is_added_by_just_as_much(name, each):
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(STEPS)
    steps = tuple(float(t) for t in scheduler.timesteps)
    noise = tuple(s / 2 for _, s in step_responses(json.loads(scheduler.to_json_string()), steps))
    plan = SimpleNamespace(sampler_correction=SamplerCorrection(name, steps, (0.0,) * STEPS, noise))
    halved = correct_sampler(SimpleNamespace(scheduler=copy.deepcopy(scheduler)), plan).scheduler
    zero, t = torch.zeros(2, 1, 64, 64), scheduler.timesteps[0]

    def generators():
        made = [torch.Generator().manual_seed(s) for s in (1, 2)]
        return made if each else made[0]

    whole = scheduler.step(zero, t, zero, generator=generators(), return_dict=False)[0]
    half = halved.step(zero, t, zero, generator=generators(), return_dict=False)[0]
    torch.testing.assert_close(half, whole / 2, rtol=1e-4, atol=1e-5)
    assert halved.step(zero, scheduler.timesteps[1], zero).prev_sample.std() > 0  # without a generator


def test_the_variance_of_the_next_sample_is_that_of_full_precision():
    fitted = Fitted((0.1,), (0.04,), (1.0,))
    (left_out,) = _noise(fitted, (0.1,), [(2.0, 1.0)])
    assert (1 - left_out) ** 2 + 2.0**2 * 0.04 / 1.1**2 == pytest.approx(1.0)
    assert _noise(fitted, (0.1,), [(9.0, 1.0)]) == (1.0,)  # more than it adds cannot be left out
    assert _noise(fitted, (0.1,), [(9.0, 0.0)]) == (0.0,)


def test_samplers_that_it_does_not_fit_are_refused_by_name(tmp_path):
    denoiser = Planted().eval().requires_grad_(False)
    with pytest.raises((TimestepError, RecipeError), match="HeunDiscreteScheduler"):
        planned(denoiser, Sampling("HeunDiscreteScheduler", beta_schedule="linear"), tmp_path / "a")
    with pytest.raises(CalibrationError, match="which one"):
        planned(denoiser, Sampling("DDIMScheduler", described=False), tmp_path / "b")
    plan = planned(denoiser, Sampling("DDIMScheduler"), tmp_path / "c")
    for other, match in (("EulerDiscreteScheduler", "fitted for DDIMScheduler"), ("HeunDiscreteScheduler", "Heun")):
        with pytest.raises(TimestepError, match=match):
            correct_sampler(SimpleNamespace(scheduler=getattr(diffusers, other)()), plan)
    pipe = correct_sampler(SimpleNamespace(scheduler=diffusers.DDIMScheduler()), plan)
    pipe.scheduler.set_timesteps(STEPS + 1)
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(PlanError, match="as many steps"):
        pipe.scheduler.step(x, pipe.scheduler.timesteps[0], x)
    assert "HeunDiscreteScheduler" not in FITTED


def test_a_plan_without_one_changes_nothing():
    pipe = SimpleNamespace(scheduler=diffusers.DDIMScheduler())
    correct_sampler(pipe, SimpleNamespace(sampler_correction=None))
    assert "step" not in vars(pipe.scheduler)
