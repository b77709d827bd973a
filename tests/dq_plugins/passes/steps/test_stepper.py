from __future__ import annotations

import pytest
import torch
from odes import TIMESTEPS, recorded, run, velocity

import dq_plugins as dq
from dq_plugins.calibration import first_tensor
from dq_plugins.errors import TimestepError
from dq_plugins.passes.steps.runs import runs_of

FEWER = (950.0, 650.0, 550.0, 150.0)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kind", ["flow", "noise", "velocity"])
def test_larger_steps_are_those_of_the_sampler(kind, guided, tmp_path):
    denoiser = velocity()
    calibration = recorded(denoiser, kind, tmp_path / "c", guided)
    stepper, runs = runs_of(calibration, "sample")
    found = runs[1].sample(stepper, FEWER, lambda kwargs: first_tensor(denoiser(**kwargs)))
    expected = run(denoiser, kind, FEWER, TIMESTEPS[-1], seed=1, guided=guided)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    assert stepper.guidance is None if not guided else abs(stepper.guidance - 3.0) < 1e-2


def test_all_recorded_timesteps_give_the_recorded_result(tmp_path):
    denoiser = velocity()
    stepper, runs = runs_of(recorded(denoiser, "noise", tmp_path / "c"), "sample")
    for each in runs:
        found = each.sample(stepper, TIMESTEPS, lambda kwargs: first_tensor(denoiser(**kwargs)))
        torch.testing.assert_close(found, each.final, atol=1e-5, rtol=1e-4)


def test_a_timestep_that_was_not_recorded_is_refused(tmp_path):
    stepper, _ = runs_of(recorded(velocity(), "flow", tmp_path / "c"), "sample")
    with pytest.raises(TimestepError, match="timestep 500 was not recorded"):
        stepper.begin((950.0, 500.0))


def test_a_sampler_that_adds_noise_is_refused(tmp_path):
    def sample(d):
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(3, 2, 4, 4, generator=generator)
            for t in TIMESTEPS:
                x = x + 0.1 * d(sample=x, timestep=torch.tensor([t])) + 0.1 * torch.randn(x.shape, generator=generator)

    calibration = dq.record(velocity(), sample, out=tmp_path / "c", progress=False)
    with pytest.raises(TimestepError, match="not linear"):
        runs_of(calibration, "sample")


def test_own_timesteps_are_spread_evenly(tmp_path):
    stepper, _ = runs_of(recorded(velocity(), "flow", tmp_path / "c"), "sample")
    assert stepper.own(3) == TIMESTEPS[:9:3]
    assert stepper.end == TIMESTEPS[-1]
