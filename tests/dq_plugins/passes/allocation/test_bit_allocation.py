from __future__ import annotations

import shutil

import pytest
import torch
from denoisers import recorded
from sensitivities import tiny_setting

import dq_plugins as dq
from dq_plugins.errors import BudgetError, RecipeError
from dq_plugins.hashing import hash_json
from dq_plugins.passes.allocation.bit_allocation import BitAllocation
from dq_plugins.passes.allocation.findings import LayerReason, explanation
from dq_plugins.plan import Targets

SMALL = {
    "sensitivity": {"weight_choices": (2, 3, 4, 8), "act_choices": (4, 8), "draws": 60, "check_entries": 16},
    "timestep-groups": {"groups": 2},
    "activation-ranges": {"observer": "minmax"},
    "weight-ranges": {"method": "minmax"},
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory):
    denoiser, calibration, _ = tiny_setting(tmp_path_factory.mktemp("setting"))
    return denoiser, calibration, tmp_path_factory.mktemp("work")


def made(setting, *, sensitivity: dict | None = None, **allocation) -> dq.QuantPlan:
    denoiser, calibration, work = setting
    options = {**SMALL, "sensitivity": {**SMALL["sensitivity"], **(sensitivity or {})}, "bit-allocation": allocation}
    folder = work / hash_json(options)[:12]
    if not folder.exists() and (others := sorted(work.iterdir())):  # the steps that are the same are not run again
        shutil.copytree(others[0], folder, ignore=shutil.ignore_patterns("run.json"))
    return dq.make_plan(denoiser, calibration, "mixdq", weight_bits=4, options=options, workdir=folder, progress=False)


def mean_bits(denoiser, plan: dq.QuantPlan) -> float:
    sizes = {n: denoiser.get_submodule(n).weight.numel() for n in plan.layers}
    return sum(sizes[n] * (p.weight.bits if p.weight else 32) for n, p in plan.layers.items()) / sum(sizes.values())


def noise(denoiser, calibration, plan: dq.QuantPlan) -> float:
    model = dq.apply(denoiser, plan, "simulate")
    pairs = [(call.run(model).double(), call.output.double()) for call in calibration.calls()]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


def test_plan_meets_the_budget_is_proven_optimal_and_predicts_its_error(setting):
    denoiser, calibration, _ = setting
    plan = made(setting)
    data = plan.sections["bit-allocation"].data
    assert data["status"] == "optimal"
    assert data["binding"] == ["weight bits"]
    assert mean_bits(denoiser, plan) == pytest.approx(data["mean_weight_bits"])
    assert data["mean_weight_bits"] <= 4
    assert {n: p.width for n, p in plan.layers.items()} == data["widths"]
    assert noise(denoiser, calibration, plan) == pytest.approx(data["predicted_noise_power"], rel=0.7)


def test_it_beats_uniform_widths_by_far(setting):
    denoiser, calibration, _ = setting
    uniform = dq.make_plan(denoiser, calibration, "fast", weight_bits=4, progress=False, edge_bits=4)
    assert noise(denoiser, calibration, made(setting)) < noise(denoiser, calibration, uniform) / 4


def test_same_inputs_same_plan(setting, tmp_path):
    denoiser, calibration, _ = setting
    assert made(setting) == made((denoiser, calibration, tmp_path))


@pytest.mark.parametrize("solver", ["mip", "greedy", "threshold"])
def test_any_solver_fits_the_budget(setting, solver: str):
    plan = made(setting, solver=solver)
    assert plan.sections["bit-allocation"].data["mean_weight_bits"] <= 4
    assert plan.sections["bit-allocation"].data["error"] >= made(setting).sections["bit-allocation"].data["error"]


def test_pins_and_role_choices(setting):
    plan = made(setting, pinned={"p": "W3A8"}, role_choices={"last": (8,)}, role_act_choices={"last": (4,)})
    assert plan.layers["p"].width == "W3A8"
    assert plan.layers["leave"].width == "W8A4"


def test_full_precision_is_offered_and_explained(setting):
    plan = made(setting, full_precision=True, weight_bits=9.0, act_bits=20)
    full = [layer for layer in plan.layers.values() if layer.activation is None]
    assert full
    assert all("bit allocation leaves its" in layer.why for layer in full)


def test_bytes_alone_replace_the_mean_bits(setting):
    denoiser, *_ = setting
    plan = made(setting, bytes=1500)
    names = [budget["name"] for budget in plan.sections["bit-allocation"].data["budgets"]]
    assert names == ["bytes"]
    assert (
        sum(-(-denoiser.get_submodule(n).weight.numel() * p.weight.bits // 8) for n, p in plan.layers.items()) <= 1500
    )


def test_impossible_budget_says_the_nearest(setting):
    with pytest.raises(BudgetError, match="nearest budget that can be met: weight bits"):
        made(setting, weight_bits=1.5)


def test_unknown_pin_is_refused(setting):
    with pytest.raises(BudgetError, match="'nowhere' is pinned"):
        made(setting, pinned={"nowhere": "W8A8"})


def test_the_papers_objective_splits_layers_by_what_they_do(setting):
    plan = made(setting, sensitivity={"content": True, "content_probes": 1}, objective="mixdq")
    data = plan.sections["bit-allocation"].data
    assert data["mean_weight_bits"] <= 4
    assert set(data["couplings"]) == {"weight", "activation"}
    assert 0 < len(data["content"]) < len(plan.layers)


def test_the_papers_objective_needs_content(setting):
    with pytest.raises(dq.DQError, match="content=True"):
        made(setting, objective="mixdq")


def test_reasons_and_fronts_are_in_the_plan(setting):
    data = made(setting, sweep=(3.0, 4.0)).sections["bit-allocation"].data
    reasons = [LayerReason(**reason) for reason in data["reasons"]]
    assert {r.layer for r in reasons} == set(data["widths"])
    assert list(data["fronts"]) == ["exact (ours)", "greedy", "one threshold (Apple)", "uniform"]
    # the front is linear around the plan, the answer around the one before it
    assert data["fronts"]["exact (ours)"][1][1] == pytest.approx(data["error"], rel=0.05)


def test_a_plan_prints_its_reasons_and_draws_its_front(setting, tmp_path):
    plan = made(setting, sweep=(3.0, 4.0))
    plan.save(tmp_path)
    plan = dq.QuantPlan.load(tmp_path)
    head, *lines = explanation(plan, limit=3).splitlines()
    assert head.startswith("optimal (cp-sat, gap ")
    assert "held back by weight bits" in head
    assert len(lines) == 4
    figure, caption = BitAllocation.figure(plan)
    assert [line.get_label() for line in figure.axes[0].lines][-1] == "chosen"
    assert "error against size" in caption
    del plan.sections["bit-allocation"]
    assert BitAllocation.figure(plan) is None
    with pytest.raises(dq.DQError, match="bit-allocation"):
        explanation(plan)


def test_floating_point_activations_leave_only_weights(tmp_path):
    denoiser, calibration, _ = tiny_setting(tmp_path)
    plan = dq.make_plan(denoiser, calibration, "mixdq", weight_bits=4, act_bits=None, options=SMALL, progress=False)
    assert all(layer.activation is None for layer in plan.layers.values())
    assert plan.sections["bit-allocation"].data["mean_weight_bits"] <= 4


def test_only_ssim_can_be_linearised(setting):
    with pytest.raises(RecipeError, match="content_metric='psnr' cannot be linearised"):
        made(setting, sensitivity={"content": True, "content_metric": "psnr"})


def test_learned_roundings_are_left_alone(tmp_path):
    denoiser, _, _ = tiny_setting(tmp_path)
    calibration = recorded(denoiser, tmp_path / "again")
    from dq_plugins.passes.width_candidates import candidates_of
    from dq_plugins.recipe import PassContext
    from dq_plugins.recipe.runner import empty_plan

    context = PassContext(denoiser, calibration, Targets(act_bits=None))
    plan = empty_plan(context, "none")
    from dq_plugins.plan import WeightQuant

    for name, layer in plan.layers.items():
        weight = denoiser.get_submodule(name).weight
        codes = torch.zeros_like(weight, dtype=torch.int8) if name == "p" else None
        layer.weight = WeightQuant(8, torch.ones(len(weight)), codes=codes)
    assert "p" not in candidates_of(plan, context, (4,), (8,)).layers
