from __future__ import annotations

import pytest
import torch
from odes import TIMESTEPS, recorded, velocity

import dq_plugins as dq
from dq_plugins.calibration import first_tensor
from dq_plugins.errors import CalibrationError, RegistryError
from dq_plugins.passes.steps.runs import runs_of


def test_the_first_images_alone_are_sampled_as_among_the_others(tmp_path):
    denoiser = velocity()
    stepper, runs = runs_of(recorded(denoiser, "noise", tmp_path / "c", guided=True), "sample")

    def sampled(run):
        return run.sample(stepper, TIMESTEPS[::3], lambda kwargs: first_tensor(denoiser(**kwargs)))

    part = runs[0].first(2)
    assert part.images == 2
    assert len(part.kwargs["scale"]) == 4
    torch.testing.assert_close(sampled(part), sampled(runs[0])[:2])


def test_a_condition_that_changes_from_step_to_step_is_refused(tmp_path):
    def sample(d):
        x = torch.ones(2, 2, 4, 4)
        for i, t in enumerate((900.0, 500.0, 100.0)):
            x = x - 0.1 * d(sample=x, timestep=torch.tensor([t]), scale=torch.tensor([1.0 + i, 1.0]))

    calibration = dq.record(velocity(), sample, out=tmp_path / "c", progress=False)
    with pytest.raises(CalibrationError, match="condition 'scale' of recorded call 1"):
        runs_of(calibration, "sample")


def test_a_sampler_that_does_not_arrive_at_the_recording_is_refused(tmp_path):
    class Sampler:
        description = {  # noqa: RUF012
            "adapter": "diffusers",
            "scheduler": {"_class_name": "DDIMScheduler", "clip_sample": False},
            "guidance": None,
        }

        def __call__(self, d):
            x = torch.ones(2, 2, 4, 4)
            for t in (900.0, 500.0, 100.0):
                x = x - 0.3 * d(sample=x, timestep=torch.tensor([t]))

    calibration = dq.record(velocity(), Sampler(), out=tmp_path / "c", progress=False)
    assert calibration.sampler == Sampler.description
    with pytest.raises(CalibrationError, match="does not arrive at the recorded samples"):
        runs_of(calibration, "sample")


def test_a_recording_of_an_unknown_adapter_says_so(tmp_path):
    class Sampler:
        description = {"adapter": "no-such-adapter"}  # noqa: RUF012

        def __call__(self, d):
            x = torch.ones(2, 2, 4, 4)
            for t in (900.0, 500.0, 100.0):
                x = x - 0.3 * d(sample=x, timestep=torch.tensor([t]))

    calibration = dq.record(velocity(), Sampler(), out=tmp_path / "c", progress=False)
    with pytest.raises(RegistryError, match="no-such-adapter"):
        runs_of(calibration, "sample")
