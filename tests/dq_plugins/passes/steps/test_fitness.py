from __future__ import annotations

import pickle

import pytest
import torch
from odes import TIMESTEPS, recorded, velocity

from dq_plugins.affine import affine_parameters
from dq_plugins.errors import RecipeError
from dq_plugins.passes.steps.fitness import DIVERGED, SamplingFitness, load_features
from dq_plugins.passes.steps.intervals import StepIntervals
from dq_plugins.passes.steps.runs import runs_of
from dq_plugins.passes.steps.space import Candidate, LayerChoices, Space
from dq_plugins.plan import WeightQuant
from dq_plugins.quantized.candidates import Candidates
from dq_plugins.quantized.width import Width


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    denoiser = velocity()
    stepper, runs = runs_of(recorded(denoiser, "noise", tmp_path_factory.mktemp("c")), "sample")
    weights = {}
    for name in ("first", "last"):
        peak = denoiser.get_submodule(name).weight.abs().flatten(1).amax(1)
        scales = {b: affine_parameters(-peak, peak, b, symmetric=True)[0] for b in (3, 8)}
        weights[name] = {b: WeightQuant(b, scale) for b, scale in scales.items()}
    grid = tuple(sorted(TIMESTEPS))
    intervals = {4: StepIntervals(grid, (0, 2, 5, 8)), len(grid): StepIntervals(grid, tuple(range(len(grid))))}
    choices = tuple(LayerChoices(n, (3, 8, None), (None,), torch.ones(3, 1).numpy()) for n in weights)
    return denoiser, Candidates(weights, {}), Space(intervals, choices, 1e9), runs, stepper


def fitness(parts, **changes):
    denoiser, candidates, space, runs, stepper = parts
    return SamplingFitness(denoiser, candidates, "timestep", space, runs, stepper, (2, 6), **changes)


ALL = Candidate((0,) * len(TIMESTEPS), (2, 0, 2, 0))


def test_every_timestep_in_full_precision_loses_nothing(parts):
    assert fitness(parts)(ALL, 1)["loss"] < 1e-9


def test_loss_is_the_error_of_the_images_and_calls_are_counted(parts):
    f = fitness(parts)
    candidate = Candidate((1, 1, 1, 0), (0, 0, 1, 0))
    found = f(candidate, 0)
    final = f.final(f.space.timesteps(candidate), {"first": Width(3, None), "last": Width(8, None)}, 2)
    assert found["loss"] == pytest.approx(float((final - f.runs[0].final[:2]).square().mean()), rel=1e-6)
    assert found["calls"] == 8
    assert f(candidate, 1)["calls"] == 24


def test_fewer_bits_and_fewer_steps_lose_more(parts):
    f = fitness(parts)
    fine, coarse = (f(ALL._replace(widths=w), 1)["loss"] for w in ((1, 0, 1, 0), (0, 0, 0, 0)))
    assert f(ALL, 1)["loss"] < fine < coarse
    assert f(Candidate((1, 1, 1, 0), (2, 0, 2, 0)), 1)["loss"] > f(ALL, 1)["loss"]


@pytest.mark.parametrize("metric", ["mse", "ssim", "frechet"])
def test_any_metric_ranks_the_same_way(parts, metric):
    f = fitness(parts, metric=metric)
    assert f(ALL, 1)["loss"] < f(Candidate((1, 1, 1, 0), (0, 0, 0, 0)), 1)["loss"]


def test_a_named_feature_network_is_compared(parts):
    f = fitness(parts, metric="frechet", features="json:dumps")
    with pytest.raises(TypeError):  # it was called with images, which json does not take
        f(ALL, 0)


@pytest.mark.parametrize("name", ["json", "json:nothing", "no_such_module_at_all:x", "json:__name__"])
def test_a_wrong_feature_network_is_named(name):
    with pytest.raises(RecipeError):
        load_features(name)


def test_images_that_are_not_finite_come_last(parts):
    assert fitness(parts).loss(torch.full((2, 2, 4, 4), float("nan"))) == DIVERGED


def test_it_leaves_the_denoiser_as_it_was_and_pickles(parts):
    denoiser = parts[0]
    before = dict(denoiser.named_parameters())
    f = fitness(parts)
    candidate = Candidate((1, 1, 1, 0), (0, 0, 1, 0))
    assert pickle.loads(pickle.dumps(f))(candidate, 0) == f(candidate, 0)
    assert all(p is before[n] for n, p in denoiser.named_parameters())


def test_a_sampler_that_adds_noise_needs_a_distance_of_distributions(parts):
    class Noisy:
        stochastic, guidance = True, None

    denoiser, candidates, space, runs, _ = parts
    with pytest.raises(RecipeError, match="frechet"):
        SamplingFitness(denoiser, candidates, "timestep", space, runs, Noisy(), (2,))
    SamplingFitness(denoiser, candidates, "timestep", space, runs, Noisy(), (2,), metric="frechet")
