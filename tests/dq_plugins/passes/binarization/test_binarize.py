from __future__ import annotations

import copy

import pytest
import torch
from binary_models import tiny_denoiser, tiny_inputs

import dq_plugins as dq
import dq_plugins.graph as graph
from dq_plugins.errors import PlanError
from dq_plugins.passes.binarization import binarydm_choices, choices_of, evolve, to_plan, train_quantized
from dq_plugins.passes.binarization.binarize import Binarize
from dq_plugins.quantized.simulate import SimulateAdapter
from dq_plugins.recipe import Recipe, Step, make_plan
from dq_plugins.recipe.builtin import BINARYDM, FAST


def sample(denoiser):
    for seed in range(2):
        x = tiny_inputs(seed=seed)["sample"]
        for t in (900, 500, 100):
            with torch.no_grad():
                x = x - 0.1 * denoiser(x, torch.full((len(x),), t))
    return x


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    calibration = dq.record(denoiser, sample, out=tmp_path_factory.mktemp("calib"))
    with dq.temporary("pass", "binarize", Binarize):
        plan = make_plan(denoiser, calibration, BINARYDM, act_bits=4, progress=False)
    return denoiser, calibration, plan


def test_widths_are_binarydms(case):
    denoiser, _, plan = case
    widths = {name: layer.width for name, layer in plan.layers.items()}
    assert {widths[n] for n in ("embed", "first", "last")} <= {"W8A8", "W8A4"}
    assert {w for n, w in widths.items() if n not in ("embed", "first", "last")} == {"W1A4"}
    quant, weight = plan.layers["middle.conv1"].weight, denoiser.middle.conv1.weight
    assert quant.scheme == "binary"
    torch.testing.assert_close(quant.scale, weight.abs().flatten(1).mean(1))


def test_the_plan_runs_before_training(case):
    denoiser, _, plan = case
    model = SimulateAdapter().apply(copy.deepcopy(denoiser), plan)
    weight = model.middle.conv1.weight
    assert weight[0].unique().numel() == 2
    assert torch.isfinite(model(**tiny_inputs())).all()


def test_choices_survive_the_plan(case, tmp_path):
    denoiser, _, plan = case
    plan = dq.QuantPlan.load(plan.save(tmp_path))
    expected = binarydm_choices(graph.partition(denoiser, tiny_inputs()), 4)
    found = choices_of(plan)
    assert {n: c.weight for n, c in found.layers.items()} == {n: c.weight for n, c in expected.layers.items()}
    assert set(found.evolvable_blocks) == set(expected.evolvable_blocks)
    assert found.blocks == expected.blocks


def test_from_plan_to_training_to_plan(case):
    denoiser, _, plan = case
    model = train_quantized(copy.deepcopy(denoiser), choices_of(plan).layers)
    model(**tiny_inputs())
    evolve(model)
    expected = model(**tiny_inputs()).detach()
    trained = to_plan(model, plan)
    assert torch.equal(SimulateAdapter().apply(model, trained)(**tiny_inputs()), expected)


def test_a_plan_of_another_recipe_says_what_to_do(case):
    denoiser, calibration, _ = case
    plan = make_plan(denoiser, calibration, FAST, progress=False)
    with pytest.raises(PlanError, match="recipe\n? *'binarydm'"):
        choices_of(plan)


def test_weights_that_are_not_finite_are_refused(case, tmp_path):
    denoiser = tiny_denoiser()
    calibration = dq.record(denoiser, sample, out=tmp_path)
    denoiser.middle.conv1.weight.data[0, 0, 0, 0] = float("nan")
    object.__setattr__(calibration, "check_model", lambda model_hash: None)
    with dq.temporary("pass", "binarize", Binarize), pytest.raises(PlanError, match=r"middle\.conv1.*NaN"):
        make_plan(denoiser, calibration, BINARYDM, progress=False)


def searched(case, choices):
    denoiser, calibration, _ = case
    steps = (
        Step("weight-ranges"),
        Step("timestep-groups", {"groups": 1}),
        Step("activation-ranges"),
        Step("sensitivity", {"weight_choices": choices, "act_choices": (8,), "draws": 8, "check_entries": 4}),
        Step("bit-allocation", {"weight_bits": 3.0}),
        Step("binarize", {"keep_widths": True}),
    )
    return make_plan(denoiser, calibration, Recipe("searched", "", steps), symmetric_acts=True, progress=False)


def test_one_bit_can_be_a_width_that_a_search_takes_and_then_trains(case):
    plan = searched(case, (1, 8))
    binary = {n for n, layer in plan.layers.items() if not layer.weight.rounds}
    assert 0 < len(binary) < len(plan.layers)
    assert {layer.weight.bits for layer in plan.layers.values()} == {1, 8}
    choices = choices_of(plan)
    assert {n for n, choice in choices.layers.items() if choice.binary} == binary
    rule = choices_of(case[2])
    assert {n for n, c in choices.layers.items() if c.weight == "evolvable"} == binary & {
        n for n, c in rule.layers.items() if c.weight == "evolvable"
    }
    model = train_quantized(copy.deepcopy(case[0]), choices.layers)
    assert torch.isfinite(model(**tiny_inputs())).all()


def test_keeping_widths_without_one_bit_says_what_to_do(case):
    with pytest.raises(PlanError, match=r"weight_choices=\(1, 8\)"):
        searched(case, (2, 8))
