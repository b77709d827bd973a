from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from odes import TIMESTEPS, recorded, velocity
from scipy.stats import spearmanr

from dq_plugins.calibration import first_tensor
from dq_plugins.passes.steps.runs import runs_of
from dq_plugins.passes.steps.transitions import END, measure_transitions
from dq_plugins.progress import finish


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    denoiser = velocity()
    calibration = recorded(denoiser, "noise", tmp_path_factory.mktemp("c"))
    stepper, runs = runs_of(calibration, "sample")
    found = finish(
        measure_transitions(
            denoiser,
            stepper,
            runs,
            sorted(TIMESTEPS),
            probes=16,
            generator=torch.Generator().manual_seed(0),
        )
    )
    return denoiser, stepper, runs, found


def true_error(measured, timesteps):
    denoiser, stepper, runs, _ = measured
    with torch.no_grad():
        finals = [r.sample(stepper, timesteps, lambda kwargs: first_tensor(denoiser(**kwargs))) for r in runs]
    return float(np.mean([float((f - r.final).square().mean()) for f, r in zip(finals, runs, strict=True)]))


def test_recorded_steps_cost_nothing(measured):
    *_, t = measured
    assert max(t.error(i, i - 1) for i in range(2, len(t.nodes))) < 1e-6
    assert t.start(len(t.nodes) - 1) < 1e-6


def test_one_left_out_timestep_costs_what_is_measured(measured):
    *_, t = measured
    for left in range(2, len(t.nodes) - 1):
        timesteps = [x for x in TIMESTEPS if x != t.nodes[left]]
        assert t.error(left + 1, left - 1) ** 2 == pytest.approx(true_error(measured, timesteps), rel=0.5)


def test_costs_rank_random_schedules(measured):
    *_, t = measured
    rng = np.random.default_rng(0)
    predicted, true = [], []
    for _ in range(25):
        inner = sorted(rng.choice(np.arange(1, len(t.nodes) - 1), 3, replace=False))[::-1]
        nodes = [len(t.nodes) - 1, *map(int, inner)]
        predicted.append(sum(t.error(a, b) ** 2 for a, b in [*pairwise(nodes), (nodes[-1], END)]))
        true.append(true_error(measured, [t.nodes[n] for n in nodes]))
    assert spearmanr(predicted, true).statistic > 0.85


def test_gain_predicts_what_noise_on_one_output_becomes(measured):
    denoiser, stepper, runs, t = measured
    node = 6
    start = TIMESTEPS.index(t.nodes[node])
    generator = torch.Generator().manual_seed(3)

    def noisy(kwargs):
        y = first_tensor(denoiser(**kwargs))
        if float(kwargs["timestep"]) == TIMESTEPS[start]:
            y = y + 1e-2 * y.square().mean().sqrt() * torch.randn(y.shape, generator=generator)
        return y

    moved = [r.sample(stepper, TIMESTEPS, noisy) - r.final for r in runs for _ in range(8)]
    found = float(torch.stack(moved).square().mean())
    assert 1e-4 * t.gain(node, node - 1) == pytest.approx(found, rel=0.4)


def test_change_is_what_leaving_out_the_next_timestep_costs(measured):
    *_, t = measured
    change = t.change()
    assert len(change) == len(t.nodes)
    for node in range(2, len(t.nodes)):
        timesteps = [x for x in TIMESTEPS if x != t.nodes[node - 1]]
        assert change[node] ** 2 == pytest.approx(true_error(measured, timesteps), rel=0.5)
    assert change[0] == change[1] == t.error(1, END)  # after the last timestep nothing is left to step over
