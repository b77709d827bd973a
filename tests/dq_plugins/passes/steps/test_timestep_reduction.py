from __future__ import annotations

import pytest
import torch
from interruptions import interrupted_after
from odes import TIMESTEPS, recorded, velocity

import dq_plugins as dq
from dq_plugins.errors import BudgetError
from dq_plugins.passes.steps.timestep_reduction import TimestepReduction, as_noise
from dq_plugins.quantized.candidates import Entry
from dq_plugins.recipe import Recipe, Step

SEARCH = {"generations": 2, "population": 8, "parents": 3, "mutants": 4, "crossovers": 2, "seconds": 0.5}
MEASURE = {"draws": 20, "check_entries": 4, "weight_choices": (3, 4, 8), "act_choices": (4, 8)}
RANGES = (Step("weight-ranges"), Step("timestep-groups", {"groups": 2}), Step("activation-ranges"))
JOINT = Recipe("joint", "", (*RANGES, Step("sensitivity", MEASURE), Step("timestep-reduction", SEARCH)))
ALONE = Recipe("alone", "", (Step("timestep-reduction", SEARCH),))


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    denoiser = velocity()
    return denoiser, recorded(denoiser, "noise", tmp_path_factory.mktemp("c"))


def make(setting, recipe=JOINT, **options):
    denoiser, calibration = setting
    workdir = options.pop("workdir", None)
    return dq.make_plan(
        denoiser,
        calibration,
        recipe,
        weight_bits=4,
        act_bits=8,
        options={"timestep-reduction": options},
        workdir=workdir,
        progress=False,
    )


@pytest.fixture(scope="module")
def joint(setting):
    return make(setting, steps=(4, 3, 5), sweep=(0.8, 1.5))


def test_the_plan_holds_a_schedule_and_widths_within_the_budget(joint):
    data = joint.sections["timestep-reduction"].data
    assert len(joint.sampling) in (3, 4, 5)
    assert set(joint.sampling.timesteps) <= set(TIMESTEPS)
    assert data["cost"] <= data["budget"]
    widths = {(layer.weight.bits, layer.activation.bits) for layer in joint.layers.values()}
    assert all(w in (3, 4, 8) and a in (4, 8) for w, a in widths)


def test_what_measures_best_is_chosen(joint):
    data = joint.sections["timestep-reduction"].data
    assert data["loss"] == min(data["losses"].values()) == data["losses"][data["chosen_by"]]
    assert data["losses"]["evolution"] <= data["losses"]["exact"] * (1 + 1e-9)  # it begins there


def test_both_ways_report_what_they_cost(joint):
    data = joint.sections["timestep-reduction"].data
    assert data["exact"]["status"] == "optimal"
    assert data["exact"]["calls"] > 0
    assert data["evolution"]["calls"] > 0
    assert len(data["evolution"]["history"]) == 3


def test_cost_is_steps_times_bitops(joint, setting):
    denoiser, calibration = setting
    layers = dq.partition(denoiser, calibration.example_inputs()).layers
    per_step = sum(layers[n].macs * p.weight.bits * p.activation.bits for n, p in joint.layers.items())
    assert joint.sections["timestep-reduction"].data["cost"] == len(joint.sampling) * per_step


def test_the_figure_shows_the_points_of_the_sweep(joint):
    figure, _ = TimestepReduction.figure(joint)
    (axis,) = figure.axes
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["joint", "own timesteps, uniform bits", "own timesteps, best bits", "chosen"]


def test_timesteps_alone_are_better_than_the_samplers_own(setting):
    plan = make(setting, ALONE, steps=(4,), spacing="change", sweep=(1.0,), budget=1.0)
    data = plan.sections["timestep-reduction"].data
    assert len(plan.sampling) == 4
    assert all(layer.weight is None for layer in plan.layers.values())
    assert data["loss"] < data["points"]["own timesteps, best bits"][0][1]


@pytest.mark.parametrize("search", ["evolution", "exact"])
@pytest.mark.parametrize("spacing", ["uniform", "change"])
def test_every_spacing_and_search_makes_a_plan(setting, search, spacing):
    plan = make(setting, ALONE, steps=(4,), search=search, spacing=spacing)
    assert plan.sections["timestep-reduction"].data["chosen_by"] == search
    assert TimestepReduction.figure(plan) is None  # no sweep was asked for
    assert len(plan.sampling) == 4


def test_an_interrupted_search_ends_with_the_same_plan(setting, joint, tmp_path, monkeypatch):
    options = {"steps": (4, 3), "workdir": tmp_path}
    whole = make(setting, steps=(4, 3))
    with interrupted_after(9, monkeypatch), pytest.raises(KeyboardInterrupt):
        make(setting, **dict(options))
    assert make(setting, **dict(options)) == whole


def test_learned_quantizers_reach_the_plan(setting):
    plan = make(setting, steps=(3,), search="exact", calibration="random", iterations=40)
    assert any(layer.weight.codes is not None for layer in plan.layers.values())
    applied = dq.apply(setting[0], plan, "simulate")
    assert torch.isfinite(applied(sample=torch.ones(1, 2, 4, 4), timestep=torch.tensor([550.0]))).all()


def test_a_latency_table_replaces_bitops(setting):
    choices = [f"W{w}A{a}" for w in (3, 4, 8) for a in (4, 8)]
    names = list(make(setting, ALONE, steps=(2,), search="exact").layers)
    table = {n: {width: 1.0 + 0.1 * i for i, width in enumerate(choices)} for n in names}
    plan = make(setting, steps=(3,), latency_table=table, budget=10.0, search="exact")
    data = plan.sections["timestep-reduction"].data
    assert data["unit"] == "ms"
    chosen = [table[n][layer.width] for n, layer in plan.layers.items()]
    assert data["cost"] == pytest.approx(3 * sum(chosen))
    assert data["cost"] <= 10.0
    busy = make(setting, steps=(3,), latency_table=table, call_latency=0.4, budget=11.0, search="exact")
    spent = [table[n][layer.width] for n, layer in busy.layers.items()]
    assert busy.sections["timestep-reduction"].data["cost"] == pytest.approx(3 * (0.4 + sum(spent)))
    with pytest.raises(BudgetError, match="no time of layer"):
        make(setting, steps=(3,), latency_table={names[0]: table[names[0]]}, search="exact")


def test_budgets_and_steps_that_cannot_be_met_are_refused(setting):
    with pytest.raises(BudgetError, match="no schedule fits"):
        make(setting, steps=(4,), budget=1.0)
    with pytest.raises(BudgetError, match="40 steps cannot be chosen from 9"):
        make(setting, ALONE, steps=(40,))


def test_errors_of_the_image_become_the_noise_that_leads_to_them():
    class Costs:
        nodes = (1.0, 2.0, 3.0)

        def gain(self, start, end):
            assert end == (start - 1 if start else -1)
            return 0.1 * (start + 1)

    entry = Entry("layer", "weight", 4)
    assert as_noise({entry: 0.3}, Costs()) == {entry: pytest.approx(0.3 / 0.6)}
    assert as_noise({entry: 0.3}, None) == {entry: 0.3}


def test_widths_are_chosen_by_the_image_where_it_was_measured(setting):
    plan = make(setting, steps=(4,))
    image = plan.sensitivity.image
    assert image is not None
    assert image.check.rank_correlation > 0.5
