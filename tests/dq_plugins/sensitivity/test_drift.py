"""A sampler of known closed form: every step adds the denoiser's output, so the image is the sum of all outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sensitivities import tiny_setting
from torch import nn

import dq_plugins as dq
from dq_plugins.plan import WeightQuant
from dq_plugins.progress import finish
from dq_plugins.quantized.candidates import Candidates, Entry
from dq_plugins.sensitivity.drift import DriftProbes, ImageError, directions, image_error
from dq_plugins.sensitivity.exact_noise import ExactQuality, final_samples
from dq_plugins.sensitivity.measure import measure
from dq_plugins.sensitivity.probes import carried_back
from dq_plugins.sensitivity.sensitivity_table import relative
from dq_plugins.sensitivity.trajectory import trajectories_of

STEPS, OFFSET, NOISE = 16, 0.1, 0.2
SCHEDULE = tuple(float(t) for t in range(STEPS + 1, 0, -1))


class Sum(nn.Module):
    """An offset, the same at every step and pixel, and a pattern of random signs, another one at every step.

    ``two`` gives the offset a second time, with the opposite sign: the two take each other away.
    """

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.offset, self.two, self.noise = (nn.Linear(1, 1, bias=False) for _ in range(3))
        self.patterns = torch.randint(0, 2, (STEPS + 2, 4, 1, 8, 8), generator=draw).float() * 2 - 1
        for layer in (self.offset, self.two, self.noise):
            nn.init.constant_(layer.weight, 1.0)

    def forward(self, sample, timestep):
        ones = torch.ones(*sample.shape, 1)
        pattern = self.patterns[int(timestep.flatten()[0]), : len(sample)]
        out = 0.1 * (self.offset(ones) - self.two(ones)) + self.noise(pattern[..., None])
        return out[..., 0] + 0 * sample


def moved_by(amount: float) -> dict[int, WeightQuant]:
    """A quantizer that makes 1 of the weight ``1 + amount``."""
    return {4: WeightQuant(4, torch.tensor([1.0 + amount]))}


@pytest.fixture
def planted(tmp_path: Path):
    denoiser = Sum().eval().requires_grad_(False)

    def sample(model: nn.Module) -> None:
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        for t in SCHEDULE:
            x = x + model(sample=x, timestep=torch.full((4,), t))

    calibration = dq.record(denoiser, sample, out=tmp_path, progress=False)
    weights = {"offset": moved_by(10 * OFFSET), "two": moved_by(10 * OFFSET), "noise": moved_by(NOISE)}
    return denoiser, calibration, Candidates(weights, {}), trajectories_of(calibration, "sample")


def measured(denoiser, candidates, runs, probes: int = 32) -> ImageError:
    return image_error(finish(measure(DriftProbes(denoiser, candidates, runs, probes))), candidates.entries())


def test_an_offset_outweighs_stronger_noise_over_the_steps(planted):
    denoiser, calibration, candidates, runs = planted
    offset, noise = Entry("offset", "weight", 4), Entry("noise", "weight", 4)
    per_step = relative(finish(measure(ExactQuality(denoiser, candidates, calibration))), candidates)
    assert per_step[noise] == pytest.approx(per_step[offset] * (NOISE / OFFSET) ** 2, rel=1e-4)
    image = measured(denoiser, candidates, runs)
    # the steps add up in amplitude, (n a)^2, or in power, n a^2
    assert image.of([offset]) == pytest.approx((STEPS * OFFSET) ** 2, rel=1e-3)
    assert image.of([noise]) == pytest.approx(STEPS * NOISE**2, rel=0.3)
    for entry in (offset, noise):
        moved = final_samples(denoiser, candidates, [entry], runs[0]) - runs[0].final()
        assert image.of([entry]) == pytest.approx(float(moved.square().mean()), rel=0.3)


def test_drifts_of_layers_add_up_and_take_each_other_away(planted):
    denoiser, _, candidates, runs = planted
    offset, two, noise = (Entry(name, "weight", 4) for name in ("offset", "two", "noise"))
    image = measured(denoiser, candidates, runs)
    assert image.of([offset, two]) < 1e-3 * image.of([offset])
    assert image.of([offset, noise]) == pytest.approx(image.of([offset]) + image.of([noise]), rel=0.05)
    assert image.beside([two])[offset] == pytest.approx(-image.of([two]), rel=1e-3)
    assert image.beside([offset])[offset] == pytest.approx(image.alone()[offset])


def test_directions_are_of_length_one_and_independent():
    final = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) + 2
    found = directions(final).flatten(2)  # [F, B, D]
    assert torch.allclose(torch.einsum("fbd,gbd->bfg", found, found), torch.eye(3).expand(3, 3, 3), atol=1e-5)


def test_it_predicts_the_images_of_random_plans(tmp_path: Path):
    denoiser, calibration, candidates = tiny_setting(tmp_path, batch=4)
    runs = trajectories_of(calibration, "sample")
    image = measured(denoiser, candidates, runs, probes=64)
    rng, predicted, true = np.random.default_rng(0), [], []
    for _ in range(40):
        entries = [Entry(n, o, int(rng.choice((3, 4, 8)))) for n in candidates.layers for o in ("weight", "activation")]
        moved = final_samples(denoiser, candidates, entries, runs[0]) - runs[0].final()
        predicted.append(image.of(entries))
        true.append(float(moved.double().square().mean()))
    assert spearmanr(predicted, true).statistic > 0.9
    assert float(np.exp(np.mean(np.log(np.divide(predicted, true))))) == pytest.approx(1, rel=0.3)


def test_what_the_groups_of_an_input_do_adds_up_to_what_it_does_as_a_whole(tmp_path: Path):
    denoiser, calibration, candidates = tiny_setting(tmp_path, batch=2)
    run = trajectories_of(calibration, "sample")[0]
    probes = torch.randn(2, *run.final().shape, generator=torch.Generator().manual_seed(0))
    whole = carried_back(denoiser, candidates, run, probes)
    by_group = carried_back(denoiser, candidates, run, probes, by_group=True)
    for entry, moved in whole.items():
        parts = [each for other, each in by_group.items() if other[:3] == tuple(entry)]
        assert len(parts) == (run.steps if entry.operand == "activation" else 1)
        torch.testing.assert_close(sum(parts), moved)
    measured = DriftProbes(denoiser, candidates, [run], by_group=True)
    assert set(measured.entries()) == set(by_group)
