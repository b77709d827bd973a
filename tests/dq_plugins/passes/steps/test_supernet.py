from __future__ import annotations

import numpy as np
import pytest
import torch
from crashes import survives_kills
from scipy.stats import spearmanr

import dq_plugins as dq
from dq_plugins.artifact import UnitResults
from dq_plugins.hashing import weights_hash
from dq_plugins.passes.steps.supernet import LEARNED, CalibrationOptions, calibrate
from dq_plugins.passes.width_candidates import candidates_of
from dq_plugins.progress import finish
from dq_plugins.quantized import resuming
from dq_plugins.quantized.layer_transform import transforms_of
from dq_plugins.quantized.learner import Learner
from dq_plugins.quantized.network import SuperNetwork
from dq_plugins.quantized.soft_rounding import SoftRounding
from dq_plugins.quantized.width import Width
from dq_plugins.recipe import PassContext, Recipe, Step
from dq_plugins.testing.denoiser import calibrated

RANGES = Recipe(
    "ranges", "", (Step("weight-ranges"), Step("timestep-groups", {"groups": 2}), Step("activation-ranges"))
)
QUICK = CalibrationOptions(iterations=25, calls=5)


@pytest.fixture(scope="module")
def setting():
    with calibrated() as (denoiser, calibration):
        denoiser.requires_grad_(False)
        plan = dq.make_plan(denoiser, calibration, RANGES, progress=False)
        context = PassContext(denoiser, calibration)
        yield denoiser, calibration, context.partition, candidates_of(plan, context, (3, 4, 6), (4, 8))


def learn(setting, **changes):
    denoiser, calibration, partition, candidates = setting
    options = CalibrationOptions(**{**vars(QUICK), **changes})
    return finish(calibrate(denoiser, candidates, calibration, partition, options))


def error(setting, candidates, widths):
    denoiser, calibration, *_ = setting
    with SuperNetwork(denoiser, candidates, "timestep") as net, torch.no_grad():
        net.switch(widths)
        return float(np.mean([float((c.run(denoiser) - c.output).square().mean()) for c in calibration.calls()]))


def random_widths(candidates, seed):
    rng = np.random.default_rng(seed)
    return {n: Width(int(rng.choice((3, 4, 6))), int(rng.choice((4, 8)))) for n in candidates.layers}


@pytest.fixture(scope="module")
def shared(setting):
    return learn(setting)


def test_it_ranks_assignments_as_networks_calibrated_for_each_do(setting, shared):
    assignments = [random_widths(setting[3], seed) for seed in range(20)]
    together = [error(setting, shared, w) for w in assignments]
    alone = [error(setting, learn(setting, draw=w, iterations=6, calls=2), w) for w in assignments]
    assert spearmanr(together, alone).statistic >= 0.8


def test_learning_lowers_the_error_of_assignments(setting, shared):
    candidates = setting[3]
    ratios = [
        error(setting, shared, random_widths(candidates, s)) / error(setting, candidates, random_widths(candidates, s))
        for s in range(8)
    ]
    assert np.median(ratios) < 1


def test_every_width_is_learned_and_nothing_else_moves(setting, shared):
    denoiser, *_, candidates = setting
    before = weights_hash(denoiser)
    again = learn(setting)
    assert again.hash == shared.hash
    assert weights_hash(denoiser) == before
    moved = [
        not torch.equal(shared.activations[n][b].scale, quant.scale)
        for n, table in candidates.activations.items()
        for b, quant in table.items()
    ]
    assert all(moved)
    assert any(q.codes is not None for table in shared.weights.values() for q in table.values())
    assert {n: set(t) for n, t in shared.weights.items()} == {n: set(t) for n, t in candidates.weights.items()}


def test_a_kill_inside_of_a_block_costs_one_iteration(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "KEPT_EVERY_S", 0.0)
    step, iterations = Learner._step, []
    monkeypatch.setattr(Learner, "_step", lambda *args: (step(*args), iterations.append(1)))
    denoiser, calibration, partition, candidates = setting
    options, folder = CalibrationOptions(iterations=3, calls=1), tmp_path / "work"

    def run() -> str:
        kept = (UnitResults(format, folder, {}) for format in (LEARNED, resuming.STATE))
        return finish(calibrate(denoiser, candidates, calibration, partition, options, *kept)).hash

    states = survives_kills(run, folder, tmp_path / "store", units=lambda: len(iterations), every=11)
    assert {state.units % 3 for state in states} == {0, 1, 2}


def test_the_regulariser_makes_roundings_decide(setting, monkeypatch):
    *_, candidates = setting
    options = {"draw": dict.fromkeys(candidates.layers, Width(3, 8)), "iterations": 40, "calls": 2}
    codes = SoftRounding.decided
    undecided: list[float] = []

    def remembered(self):
        undecided.append(float(self.undecided(2.0).detach()) / self.parameter.numel())
        return codes(self)

    monkeypatch.setattr(SoftRounding, "decided", remembered)

    def left_open(weight: float) -> float:
        undecided.clear()
        learn(setting, **options, method="adaround", learning_rate=0.05, weight=weight)
        return float(np.mean(undecided))

    assert left_open(1.0) < 0.7 * left_open(0.0)


def test_independent_sets_differ_from_shared_ones(setting, shared):
    apart = learn(setting, draw="independent", iterations=4, calls=2)
    assert apart.hash != shared.hash


def test_a_fixed_assignment_moves_only_its_own_widths(setting):
    candidates = setting[3]
    widths = dict.fromkeys(candidates.layers, Width(4, 8))
    found = learn(setting, draw=widths, iterations=4, calls=2)
    for name, table in candidates.activations.items():
        assert torch.equal(found.activations[name][4].scale, table[4].scale)
    assert all(found.weights[n][6].codes is None for n in candidates.weights)


def test_one_bit_keeps_its_signs_while_the_others_learn(setting):
    denoiser, calibration, partition, _ = setting
    plan = dq.make_plan(denoiser, calibration, RANGES, progress=False)
    candidates = candidates_of(plan, PassContext(denoiser, calibration), (1, 4), (8,))
    learned = finish(calibrate(denoiser, candidates, calibration, partition, QUICK))
    for name in candidates.layers:
        one = learned.weights[name][1]
        assert one.scheme == "binary"
        assert one is candidates.weights[name][1]
    assert any(table[4].codes is not None for table in learned.weights.values())


def test_signs_alone_with_full_precision_inputs_leave_nothing_to_learn(setting):
    denoiser, calibration, partition, _ = setting
    plan = dq.make_plan(denoiser, calibration, RANGES, progress=False)
    candidates = candidates_of(plan, PassContext(denoiser, calibration), (1, 4), (8,))
    signs = dict.fromkeys(candidates.layers, Width(1, None))
    options = CalibrationOptions(iterations=3, calls=2, draw=signs)
    learned = finish(calibrate(denoiser, candidates, calibration, partition, options))
    assert all(table[4].codes is None for table in learned.weights.values())


def test_balanced_layers_learn_as_plain_ones_do(setting):
    denoiser, calibration, *_ = setting
    steps = (Step("channel-balance", {"least_gain": 0.0}), *RANGES.steps)
    plan = dq.make_plan(denoiser, calibration, Recipe("balanced", "", steps), progress=False)
    transforms = transforms_of(plan.layers)
    context = PassContext(denoiser, calibration, transforms=transforms)
    candidates = candidates_of(plan, context, (3, 4, 6), (4, 8))
    case = denoiser, calibration, context.partition, candidates
    learned = learn(case)
    assert learned.transforms.keys() == transforms.keys() != set()
    widths = dict.fromkeys(candidates.layers, Width(3, 8))
    assert error(case, learned, widths) < error(case, candidates, widths)
