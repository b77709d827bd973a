from __future__ import annotations

import pickle

import diffusers
import pytest
import torch
from dq_diffusers.schedules import SCHEDULERS, install_schedule, planned_scheduler
from dq_diffusers.stepping import DiffusersStepper

from dq_plugins.errors import TimestepError

GENERATED = ("DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler")
UNEVEN = (999.0, 700.0, 650.0, 200.0, 30.0)


def stock(name, **config):
    return getattr(diffusers, name)(**config)


def sampled(scheduler, steps):
    scheduler.set_timesteps(steps)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    generator = torch.Generator().manual_seed(2)
    extra = {"generator": generator} if type(scheduler).__name__ in GENERATED else {}
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(scaled.tanh() * 0.5, t, x, **extra).prev_sample
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_schedulers_own_timesteps_give_its_own_samples(name):
    scheduler = stock(name)
    expected = sampled(scheduler, 10)
    planned = planned_scheduler(scheduler, [float(t) for t in scheduler.timesteps])
    assert torch.equal(sampled(planned, 50), expected)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_uneven_timesteps_are_visited_and_survive_save_and_pickle(name, tmp_path):
    planned = planned_scheduler(stock(name), UNEVEN)
    expected = sampled(planned, 20)
    assert planned.timesteps.tolist() == list(UNEVEN)
    planned.save_pretrained(tmp_path)
    for again in (type(planned).from_pretrained(tmp_path), pickle.loads(pickle.dumps(planned))):
        assert torch.equal(sampled(again, 3), expected)


def test_ddim_goes_from_one_planned_timestep_to_the_next():
    planned = planned_scheduler(stock("DDIMScheduler", clip_sample=False), (600.0, 250.0))
    planned.set_timesteps(2)
    x, eps = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.5)
    alpha = planned.alphas_cumprod
    clean = (x - (1 - alpha[600]).sqrt() * eps) / alpha[600].sqrt()
    expected = alpha[250].sqrt() * clean + (1 - alpha[250]).sqrt() * eps
    torch.testing.assert_close(planned.step(eps, torch.tensor(600), x).prev_sample, expected)
    assert planned.num_inference_steps == 2


def test_flow_matching_sigmas_follow_from_timesteps_whatever_the_shift():
    planned = planned_scheduler(stock("FlowMatchEulerDiscreteScheduler", shift=3.0), (1000.0, 640.0, 80.0))
    planned.set_timesteps(7, sigmas=[1.0, 0.5], mu=0.3)
    torch.testing.assert_close(planned.sigmas, torch.tensor([1.0, 0.64, 0.08, 0.0]))


@pytest.mark.parametrize("name", ["PNDMScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"])
def test_others_are_refused_by_name(name):
    with pytest.raises(TimestepError, match=name):
        planned_scheduler(stock(name), UNEVEN)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
    ],
)
def test_settings_that_ignore_timesteps_are_refused(name, config):
    with pytest.raises(TimestepError, match=name):
        planned_scheduler(stock(name, **config), UNEVEN)


@pytest.mark.parametrize("bad", [(), (10.0, 20.0), (1000.0, 5.0), (10.5, 3.0), (5.0, -1.0)])
def test_timesteps_that_ddim_cannot_visit_are_refused(bad):
    with pytest.raises(TimestepError, match="DDIMScheduler visits descending"):
        planned_scheduler(stock("DDIMScheduler"), bad)


def test_a_plan_without_sampling_timesteps_changes_no_pipeline():
    class Pipe:
        scheduler = object()

    class Plan:
        sampling = None

    before = Pipe.scheduler
    assert install_schedule(Pipe(), Plan()).scheduler is before


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stepper_samples_as_the_scheduler_does(name):
    scheduler = stock(name)
    scheduler.set_timesteps(5)
    config = {**scheduler.config, "_class_name": name}
    stepper = DiffusersStepper(config)
    timesteps = [float(t) for t in scheduler.timesteps]
    run = stepper.begin(timesteps)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    x = noise * run.spread
    for step in range(len(timesteps)):
        x = run.step(step, run.scale(step, x).tanh() * 0.5, x)
    if stepper.stochastic:
        assert x.shape == noise.shape
    else:
        assert torch.equal(x, sampled(scheduler, 5))


def test_stepper_says_what_is_stochastic_and_refuses_unknown_names():
    assert DiffusersStepper({"_class_name": "DDPMScheduler"}).stochastic
    assert not DiffusersStepper({"_class_name": "DDIMScheduler"}).stochastic
    with pytest.raises(TimestepError, match="NoSuchScheduler"):
        DiffusersStepper({"_class_name": "NoSuchScheduler"})


def test_a_pipeline_quantized_with_a_chosen_schedule_visits_it_after_saving_too(tmp_path):
    import dq_diffusers
    from dq_diffusers.recording import denoiser_of, load_pipeline

    from dq_plugins.bundled_denoisers import bundled
    from dq_plugins.recipe import Recipe, Step

    pipe = load_pipeline(bundled("digits"))
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=False)
    recipe = Recipe("steps", "", (Step("timestep-reduction", {"steps": (3,), "search": "exact", "probes": 1}),))
    plan = dq_diffusers.quantize(
        pipe, recipe, act_bits=None, steps=8, images=1, class_labels=[3], backend="simulate", progress=False
    )
    assert len(plan.sampling) == 3
    first = visited(pipe)
    assert first == list(plan.sampling.timesteps)
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    again = load_pipeline(bundled("digits"))
    again.scheduler = type(pipe.scheduler).from_pretrained(tmp_path / "scheduler")
    assert visited(again) == first
    assert denoiser_of(pipe)[0] == "transformer"


def visited(pipe):
    """Timesteps that the denoiser is told when the pipeline samples with its default number of steps."""
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(float(kwargs["timestep"].reshape(-1)[0])), with_kwargs=True
    )
    pipe.set_progress_bar_config(disable=True)
    pipe(class_labels=[3], generator=torch.Generator().manual_seed(0), output_type="np")
    handle.remove()
    return seen


def test_a_whole_pipeline_with_planned_timesteps_is_saved_and_loaded(tmp_path):
    from dq_diffusers.recording import load_pipeline

    from dq_plugins.bundled_denoisers import bundled

    pipe = load_pipeline(bundled("digits"))
    pipe.scheduler = planned_scheduler(pipe.scheduler, (999.0, 500.0, 40.0))
    pipe.save_pretrained(tmp_path / "pipe")
    assert visited(load_pipeline(tmp_path / "pipe")) == [999.0, 500.0, 40.0]
