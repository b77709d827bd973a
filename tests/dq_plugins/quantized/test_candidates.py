from __future__ import annotations

from dataclasses import replace

import pytest
from attention_models import RECIPE, attention_calls_recorded, attention_denoiser
from sensitivities import tiny_setting

import dq_plugins as dq
from dq_plugins.passes.width_candidates import candidates_of
from dq_plugins.quantized.attention import attending_module, site_name
from dq_plugins.quantized.candidates import Candidates, Entry
from dq_plugins.quantized.width import Width, entries_of, widths_of
from dq_plugins.recipe import PassContext


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory):
    return tiny_setting(tmp_path_factory.mktemp("setting"))


def test_entries_cover_every_layer_side_and_width(setting):
    denoiser, _, candidates = setting
    layers = [n for n, m in denoiser.named_modules() if hasattr(m, "weight")]
    assert len(candidates.entries()) == len(layers) * 2 * 4
    assert candidates.entries()[:2] == [Entry(layers[0], "weight", 2), Entry(layers[0], "weight", 3)]
    assert str(candidates.entries()[0]) == f"{layers[0]}.weight@2"


def test_hash_changes_with_any_quantizer(setting):
    _, _, candidates = setting
    other = dict(candidates.weights)
    other["enter"] = {**other["enter"], 2: other["enter"][3]}
    assert Candidates(other, candidates.activations, candidates.groups).hash != candidates.hash
    assert candidates.subset(candidates.entries()).hash == candidates.hash


def test_subset_keeps_only_what_is_asked_for(setting):
    _, _, candidates = setting
    entry = Entry("leave", "activation", 4)
    small = candidates.subset([entry])
    assert small.entries() == [entry]
    assert small.layers == ("leave",)


def test_entries_make_widths_and_back():
    entries = [Entry("enter", "weight", 2), Entry("enter", "activation", 3), Entry("leave", "activation", 4)]
    assert widths_of(entries) == {"enter": Width(2, 3), "leave": Width(None, 4)}
    assert entries_of(widths_of(entries)) == entries


@pytest.fixture(scope="module")
def attending(tmp_path_factory: pytest.TempPathFactory):
    denoiser = attention_denoiser()
    calibration = attention_calls_recorded(denoiser, tmp_path_factory.mktemp("attending"))
    plan = dq.make_plan(denoiser, calibration, RECIPE, progress=False)
    return denoiser, plan, candidates_of(plan, PassContext(denoiser, calibration, plan.targets), (8,), (4, 8))


def test_attentions_come_behind_layers_under_names_that_no_layer_has(attending):
    denoiser, _, candidates = attending
    sites = [site_name(name) for name in ("near", "far")]
    assert candidates.entries()[-4:] == [Entry(site, "activation", bits) for site in sites for bits in (4, 8)]
    assert not {*sites} & {name for name, _ in denoiser.named_modules()}
    assert not {*sites} & {*candidates.layers}
    assert [attending_module(site) for site in sites] == ["near", "far"]
    assert attending_module("near") is None
    assert attending_module(site_name("")) == ""


def test_subset_and_groups_of_an_attention(attending):
    _, _, candidates = attending
    entry = Entry(site_name("near"), "activation", 4)
    small = candidates.subset([entry])
    assert small.entries() == [entry]
    assert small.layers == ()
    assert candidates.in_group(entry, 900.0) == entry  # all groups of an attention have one width
    assert candidates.subset(candidates.entries()).hash == candidates.hash


def test_the_hash_knows_each_operand_of_an_attention(attending):
    _, _, candidates = attending
    for operand in ("query", "key", "value"):
        site, found = site_name("near"), candidates.attention[site_name("near")][4]
        quant = getattr(found, operand)
        other = replace(found, **{operand: replace(quant, scale=quant.scale * 2)})
        attention = {**candidates.attention, site: {**candidates.attention[site], 4: other}}
        assert replace(candidates, attention=attention).hash != candidates.hash
