from __future__ import annotations

import pytest
import torch
from denoisers import SCHEDULE, recorded, tiny_denoiser
from torch import nn

import dq_plugins as dq
from dq_plugins.calibration import first_tensor
from dq_plugins.errors import CalibrationError
from dq_plugins.sensitivity.trajectory import trajectories_of


def guided_sampler(noise: float = 0.0, seed: int = 0):
    def sample(denoiser: nn.Module) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 2, 8, 8, generator=generator)
        for k, t in enumerate(SCHEDULE):
            y = denoiser(sample=torch.cat([x, x]), timestep=torch.full((4,), t) + 0 * k)
            one, two = y.chunk(2)
            x = 0.9 * x - 0.2 * (one + 3 * (two - one)) + noise * torch.randn(x.shape, generator=generator)

    return sample


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_denoiser()

    def forward(self, sample, timestep):
        one, two = self.inner(sample, timestep).chunk(2)
        return torch.cat([one, 0.5 * two.flip(1)])


def replayed(denoiser: nn.Module, trajectory):
    with torch.no_grad():
        return trajectory.replay(lambda kwargs: first_tensor(denoiser(**kwargs)))


def test_updates_of_a_linear_sampler_are_found(tmp_path):
    denoiser = tiny_denoiser()
    (run,) = trajectories_of(recorded(denoiser, tmp_path), "sample")
    assert run.steps == len(SCHEDULE) - 1
    for update in run.updates:
        assert (update.sample, *update.outputs) == pytest.approx((0.5, 0.3), abs=1e-5)
    assert run.unexplained < 1e-9
    assert torch.equal(replayed(denoiser, run), run.final())


def test_guidance_in_one_batch_and_the_samplers_own_noise(tmp_path):
    denoiser = TwoBranches().eval().requires_grad_(False)
    calibration = dq.record(denoiser, guided_sampler(noise=0.02), out=tmp_path, progress=False)
    (run,) = trajectories_of(calibration, "sample")
    assert run.images == 2
    for update in run.updates:
        assert (update.sample, *update.outputs) == pytest.approx((0.9, 0.4, -0.6), abs=0.1)
    assert run.unexplained > 1e-3
    assert torch.equal(replayed(denoiser, run), run.final())


def test_several_runs_are_told_apart(tmp_path):
    denoiser = tiny_denoiser()

    def twice(d: nn.Module) -> None:
        for seed in (0, 1):
            x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
            for t in SCHEDULE:
                x = 0.5 * x + 0.3 * d(sample=x, timestep=torch.full((2,), t))

    runs = trajectories_of(dq.record(denoiser, twice, out=tmp_path, progress=False), "sample")
    assert [run.calls for run in runs] == [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
    assert not torch.equal(runs[0].final(), runs[1].final())


def test_a_changed_denoiser_gives_what_sampling_with_it_gives(tmp_path):
    denoiser = tiny_denoiser()
    calibration = recorded(denoiser, tmp_path)
    (run,) = trajectories_of(calibration, "sample")
    with torch.no_grad():
        denoiser.enter.weight.mul_(1.3)
        x = calibration.example_inputs()["sample"]
        for t in SCHEDULE[:-1]:
            x = 0.5 * x + 0.3 * denoiser(sample=x, timestep=torch.full((2,), t))
    assert torch.allclose(replayed(denoiser, run), x, atol=1e-4)


def test_gradient_is_carried_over_a_step(tmp_path):
    denoiser = tiny_denoiser()
    (run,) = trajectories_of(recorded(denoiser, tmp_path), "sample")
    call = run.call(0)
    sample = call.kwargs[run.argument].clone().requires_grad_()
    kwargs = {**call.kwargs, run.argument: sample}
    output = denoiser(**kwargs)
    probe = torch.randn(output.shape)
    onto_output, onto_sample = run.split(0, probe, output.detach())
    carried = onto_sample + run.fold(torch.autograd.grad(output, sample, onto_output, retain_graph=True)[0])
    (direct,) = torch.autograd.grad(0.5 * sample + 0.3 * output, sample, probe)
    assert torch.allclose(carried, direct, atol=1e-5)


def test_one_step_runs_end_with_their_output(tmp_path):
    denoiser = tiny_denoiser()
    (run,) = trajectories_of(recorded(denoiser, tmp_path, schedule=(500.0,)), "sample")
    assert torch.equal(run.final(), run.call(0).output)
    assert torch.equal(replayed(denoiser, run), run.final())


def test_a_recording_without_whole_runs_is_refused(tmp_path):
    calibration = recorded(tiny_denoiser(), tmp_path)
    part = calibration.subset(timesteps=calibration.timesteps[:2])
    with pytest.raises(CalibrationError, match="no complete sampling run"):
        trajectories_of(part, "sample")


CUT = 0.125


class Clipping:
    """A sampler that remembers its last output, and cuts its samples off."""

    guidance, stochastic = None, False

    def begin(self, timesteps):
        return ClippingRun()


class ClippingRun:
    spread = 1.0

    def __init__(self) -> None:
        self.last = None

    def scale(self, step, sample):
        return sample / (1 + step)

    def step(self, step, output, sample):
        moved = output if self.last is None else 1.5 * output - 0.5 * self.last
        self.last = output
        return (0.5 * sample + 4 * moved).clamp(-CUT, CUT)


class Sampled:
    """What `dq_plugins.record` takes, with the description of its sampler."""

    def __init__(self) -> None:
        self.description = {"adapter": "clipping"}

    def __call__(self, denoiser):
        run, x = ClippingRun(), torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        for step, t in enumerate(SCHEDULE):
            x = run.step(step, denoiser(sample=run.scale(step, x), timestep=torch.full((2,), t)), x)
        return x


@pytest.fixture
def clipped(tmp_path, monkeypatch):
    class Adapter:
        def stepper(self, described):
            return Clipping()

    monkeypatch.setattr("dq_plugins.sensitivity.trajectory.adapter", lambda name: Adapter())
    denoiser = tiny_denoiser()
    calibration = dq.record(denoiser, Sampled(), out=tmp_path, progress=False)
    (run,) = trajectories_of(calibration, "sample")
    return denoiser, run


def test_a_known_sampler_is_followed_to_its_last_sample(clipped):
    denoiser, run = clipped
    assert run.steps == len(SCHEDULE)
    final = Sampled()(denoiser)
    assert float((final.abs() == CUT).float().mean()) > 0.1  # some is cut off
    assert torch.allclose(run.final(), final, atol=1e-5)
    assert torch.allclose(replayed(denoiser, run), final, atol=1e-5)
    with torch.no_grad():
        denoiser.enter.weight.mul_(1.3)
        assert torch.allclose(replayed(denoiser, run), Sampled()(denoiser), atol=1e-5)


def test_what_a_known_sampler_cuts_off_carries_no_gradient(clipped):
    _, run = clipped
    last = run.steps - 1
    onto_output, onto_sample = run.split(last, torch.ones_like(run.final()), run.call(last).output)
    cut = run.final().abs() == CUT
    assert not onto_output[cut].any()
    assert torch.allclose(onto_output[~cut], torch.tensor(6.0))
    assert torch.allclose(onto_sample[~cut], torch.tensor(0.5))


def test_a_sampler_that_makes_other_samples_is_not_followed(tmp_path, monkeypatch):
    class Other:
        def stepper(self, described):
            other = Clipping()
            other.begin = lambda timesteps: type("Run", (ClippingRun,), {"step": lambda s, k, y, x: 2 * x})()
            return other

    monkeypatch.setattr("dq_plugins.sensitivity.trajectory.adapter", lambda name: Other())
    calibration = dq.record(tiny_denoiser(), Sampled(), out=tmp_path, progress=False)
    (run,) = trajectories_of(calibration, "sample")
    assert run.stepper is None
    assert run.steps == len(SCHEDULE) - 1


def test_a_part_of_the_images_runs_as_it_did_in_the_batch(tmp_path):
    denoiser = TwoBranches().eval().requires_grad_(False)
    calibration = dq.record(denoiser, guided_sampler(noise=0.02), out=tmp_path, progress=False)
    (run,) = trajectories_of(calibration, "sample")
    one = run.first(1)
    assert (one.images, one.branches) == (1, 2)
    assert len(one.call(0).output) == 2
    assert torch.equal(one.final(), run.final()[:1])
    with torch.no_grad():
        denoiser.inner.enter.weight.mul_(1.3)
    assert torch.allclose(replayed(denoiser, one), replayed(denoiser, run)[:1], atol=1e-5)
    assert run.first(2) is run
    assert run.parts(2) == [run]
    halves = run.parts(1)
    assert torch.equal(torch.cat([half.final() for half in halves]), run.final())
    again = [replayed(denoiser, half) for half in halves]
    assert torch.allclose(torch.cat(again), replayed(denoiser, run), atol=1e-5)
    assert torch.equal(halves[1].part(range(1)).final(), run.final()[1:])


@pytest.mark.parametrize(("most", "sizes"), [(1, [1] * 7), (3, [2, 2, 3]), (4, [3, 4]), (7, [7]), (100, [7])])
def test_parts_are_few_and_of_about_equal_size(tmp_path, most, sizes):
    (run, *_) = trajectories_of(recorded(tiny_denoiser(), tmp_path, batch=7), "sample")
    assert [part.images for part in run.parts(most)] == sizes
    assert torch.equal(torch.cat([part.final() for part in run.parts(most)]), run.final())
