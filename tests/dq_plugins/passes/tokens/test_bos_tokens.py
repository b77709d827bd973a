from __future__ import annotations

import pytest
import torch
from cross_attention import attending, recorded_texts, texts
from torch import nn

import dq_plugins as dq
from dq_plugins.metrics import mse
from dq_plugins.plan import QuantPlan
from dq_plugins.recipe import Recipe, Step

PLAIN = Recipe("plain", "", (Step("weight-ranges"), Step("activation-ranges", {"observer": "minmax"})))
EXACT = Recipe("exact", "", (*PLAIN.steps, Step("bos-tokens")))
SIDES = ("v", "w")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory):
    denoiser = attending()
    calibration = recorded_texts(denoiser, tmp_path_factory.mktemp("calibration"))
    plans = [dq.make_plan(denoiser, calibration, recipe, weight_bits=8, progress=False) for recipe in (PLAIN, EXACT)]
    return denoiser, calibration, *plans


def projected(model: nn.Module, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Keys and values of a text."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: found.update({name: y}))
        for name in SIDES
    ]
    model(sample=torch.zeros(len(text), 2, 4, 4), timestep=torch.full((len(text),), 500.0), text=text)
    for handle in handles:
        handle.remove()
    return found


def test_keys_and_values_are_found_by_role_and_their_outlier_by_probing(setting):
    *_, exact = setting
    assert {name: rows.positions for name, rows in exact.outlier_rows.items()} == {"v": (0,), "w": (0,)}
    assert exact.sections["bos-tokens"].data["seen"]["v"]["ratio"] > 50


def test_ranges_by_width_hold_for_the_other_tokens_as_well(setting):
    denoiser, calibration, _, exact = setting
    by_width = Step("activation-ranges", {"observer": "by-width"})
    recipe = Recipe("by width", "", (Step("weight-ranges"), by_width, Step("bos-tokens")))
    plan = dq.make_plan(denoiser, calibration, recipe, weight_bits=8, progress=False)
    for side in SIDES:  # min-max at 8 bits
        assert torch.equal(plan.layers[side].activation.scale, exact.layers[side].activation.scale)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_other_tokens_err_ten_times_less_and_row_zero_not_at_all(setting, batch: int):
    denoiser, _, plain, exact = setting
    text = texts(batch, seed=7)
    full, before, after = (
        projected(model, text)
        for model in (denoiser, dq.apply(denoiser, plain, "simulate"), dq.apply(denoiser, exact, "simulate"))
    )
    for side in SIDES:
        assert torch.allclose(after[side][:, 0], full[side][:, 0], rtol=1e-6, atol=1e-6)
        errors = [mse(full[side][:, 1:], found[side][:, 1:]) ** 0.5 for found in (before, after)]
        assert errors[0] > 10 * errors[1]


def test_zeroed_prompt_falls_back_to_a_live_row(setting):
    denoiser, _, _, exact = setting
    text = texts(2)
    text[1] = 0
    full, after = projected(denoiser, text), projected(dq.apply(denoiser, exact, "simulate"), text)
    for side in SIDES:
        assert torch.allclose(after[side][1, 0], full[side][1, 0], atol=1e-6)


@pytest.mark.parametrize("backend", ["torchao", "brevitas"])
def test_backends_give_the_rows_of_the_simulation(setting, backend: str):
    pytest.importorskip(backend)
    denoiser, _, _, exact = setting
    text = texts(3, seed=5)
    text[2, 0] = 0.5
    simulated, integer = (projected(dq.apply(denoiser, exact, name), text) for name in ("simulate", backend))
    for side in SIDES:
        assert torch.equal(integer[side][:2, 0], simulated[side][:2, 0])
        assert torch.allclose(integer[side], simulated[side], rtol=1e-4, atol=1e-4)


def test_an_adapter_that_does_not_implement_outlier_rows_refuses_the_plan(setting):
    *_, exact = setting
    with pytest.raises(dq.DQError, match="outlier_rows"):
        exact.refuse_unimplemented(set(), "some-adapter")


def test_plan_with_rows_survives_files(setting, tmp_path):
    *_, exact = setting
    exact.save(tmp_path)
    assert QuantPlan.load(tmp_path) == exact


def test_without_an_outlier_nothing_changes_and_the_plan_says_what_was_seen(tmp_path):
    denoiser = attending()
    calibration = recorded_texts(denoiser, tmp_path, factor=0.4)
    plan = dq.make_plan(denoiser, calibration, EXACT, progress=False)
    section = plan.sections["bos-tokens"]
    assert not plan.outlier_rows
    assert "outlier_rows" not in plan.features
    assert "no token is the same" in section.data["skipped"]
    assert section.data["seen"]["v"]["ratio"] < 4


def test_sensitivity_does_not_blame_widths_for_the_exact_row(setting):
    denoiser, calibration, _, _ = setting
    choices = {"weight_choices": (4, 8), "act_choices": (8,), "check_entries": 0}
    found = {}
    for name, recipe in (("plain", PLAIN), ("exact", EXACT)):
        measured = Recipe(name, "", (*recipe.steps, Step("sensitivity", choices)))
        plan = dq.make_plan(denoiser, calibration, measured, progress=False)
        found[name] = plan.sensitivity.noise["w"]["activation"][8]
    assert found["exact"] < found["plain"] / 20
