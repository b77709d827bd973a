"""Entries of attentions: the linearised measurement against the exact one, on a planted problem."""

from __future__ import annotations

import math

import pytest
import torch
from attention_models import RECIPE, SCHEDULE, attention_calls_recorded, attention_inputs, loud_keys_denoiser
from scipy.stats import spearmanr

import dq_plugins as dq
from dq_plugins.passes.width_candidates import candidates_of
from dq_plugins.plan import AttentionPlan, Reason
from dq_plugins.progress import finish
from dq_plugins.quantized.attention import site_name
from dq_plugins.quantized.candidates import Entry
from dq_plugins.recipe import PassContext
from dq_plugins.sensitivity.drift import DriftProbes, image_error
from dq_plugins.sensitivity.exact_noise import ExactContent, ExactQuality, noise_and_signal
from dq_plugins.sensitivity.measure import measure
from dq_plugins.sensitivity.probes import QualityProbes
from dq_plugins.sensitivity.sensitivity_table import SensitivityTable, entries_to_check, relative
from dq_plugins.sensitivity.trajectory import trajectories_of

NEAR, FAR = site_name("near"), site_name("far")
WIDTHS = (4, 6, 8)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory):
    denoiser = loud_keys_denoiser("near")
    calibration = attention_calls_recorded(denoiser, tmp_path_factory.mktemp("calibration"))
    plan = dq.make_plan(denoiser, calibration, RECIPE, progress=False)
    return denoiser, calibration, plan, candidates_of(plan, PassContext(denoiser, calibration), (4, 8), WIDTHS)


def of_attention(values: dict[Entry, float]) -> dict[Entry, float]:
    return {entry: value for entry, value in values.items() if entry.layer in (NEAR, FAR)}


@pytest.fixture(scope="module")
def estimate(setting) -> dict[Entry, float]:
    denoiser, calibration, _, candidates = setting
    return relative(finish(measure(QualityProbes(denoiser, candidates, calibration, probes=64))), candidates)


@pytest.fixture(scope="module")
def exact(setting) -> dict[Entry, float]:
    denoiser, calibration, _, candidates = setting
    return relative(finish(measure(ExactQuality(denoiser, candidates, calibration))), candidates)


def test_the_estimate_agrees_with_the_exact_measurement(estimate, exact):
    few, all_of_them = of_attention(estimate), of_attention(exact)
    assert (
        list(few) == list(all_of_them) == [Entry(site, "activation", bits) for site in (NEAR, FAR) for bits in WIDTHS]
    )
    for entry, value in few.items():
        assert value == pytest.approx(all_of_them[entry], rel=0.3)
    assert spearmanr(list(few.values()), list(all_of_them.values())).statistic == 1.0
    assert spearmanr(list(estimate.values()), [exact[e] for e in estimate]).statistic > 0.98  # among layers, too


def test_the_planted_attention_is_found_at_every_width(estimate):
    for bits in WIDTHS:
        assert estimate[Entry(NEAR, "activation", bits)] > 5 * estimate[Entry(FAR, "activation", bits)]
    layers = [value for entry, value in estimate.items() if entry.layer not in (NEAR, FAR) and entry.bits == 8]
    assert estimate[Entry(NEAR, "activation", 8)] > 3 * max(layers)


def test_the_exact_measurement_is_that_of_the_simulated_plan(setting, exact):
    denoiser, calibration, plan, candidates = setting
    alone = dq.make_plan(denoiser, calibration, RECIPE, progress=False)
    for name, layer in alone.layers.items():
        alone.layers[name] = type(layer)(layer.kind, layer.roles, unquantized_reason=Reason("alone", "asked"))
    alone.attention = {
        "near": candidates.attention[NEAR][4],
        "far": AttentionPlan(unquantized_reason=Reason("alone", "asked")),
    }
    noise, signal = noise_and_signal(dq.apply(denoiser, alone, "simulate"), calibration.calls())
    assert exact[Entry(NEAR, "activation", 4)] == pytest.approx(noise / signal, rel=1e-6)
    assert candidates.attention[NEAR][8] is plan.attention["near"]


def test_what_attentions_do_to_the_final_image(setting):
    denoiser, calibration, _, candidates = setting
    runs = trajectories_of(calibration, "sample")
    found = finish(measure(DriftProbes(denoiser, candidates, runs, probes=64)))
    alone = of_attention(image_error(found, candidates.entries()).alone())
    sites = candidates.subset(list(alone))
    measured = relative(finish(measure(ExactContent(denoiser, sites, runs, "mse"))), sites)
    for entry, value in measured.items():
        assert alone[entry] == pytest.approx(value, rel=0.4)


def test_the_denoiser_is_left_as_it_was(setting):
    denoiser, calibration, _, candidates = setting
    classes = [type(module) for module in denoiser.modules()]
    before = denoiser(**attention_inputs(SCHEDULE[1]))
    QualityProbes(denoiser, candidates, calibration, probes=1)("0")
    assert [type(module) for module in denoiser.modules()] == classes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in denoiser.modules())
    assert torch.equal(denoiser(**attention_inputs(SCHEDULE[1])), before)


def test_estimates_of_attentions_are_corrected_apart_from_those_of_layers(estimate):
    table = SensitivityTable(estimate)
    checked = entries_to_check(table, 32)
    exact = {entry: estimate[entry] * (2.0 if entry.layer in (NEAR, FAR) else 1.0) for entry in checked}
    check = table.corrected(exact, 0.0).check
    assert check.typical_ratio["attention@4"] == pytest.approx(2.0)
    assert check.typical_ratio["activation@4"] == pytest.approx(1.0)


def test_attentions_are_neither_content_nor_quality(estimate):
    half = dict.fromkeys(estimate, 0.5)
    shares = {entry: 1.0 if entry.layer in (NEAR, FAR) else 0.1 * (len(entry.layer) % 3) for entry in estimate}
    table = SensitivityTable(estimate, shares, half)
    layers = {entry.layer for entry in estimate} - {NEAR, FAR}
    assert table.metric_kinds().keys() == layers
    without = SensitivityTable(
        *({e: v for e, v in part.items() if e.layer in layers} for part in (estimate, shares, half))
    )
    assert table.metric_kinds() == without.metric_kinds()
    assert table.metric_kinds("paper", paper=["enter"]).keys() == layers
    assert all(math.isfinite(value) for value in table.structure_shares().values())
