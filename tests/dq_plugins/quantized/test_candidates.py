from __future__ import annotations

import pytest
from sensitivities import tiny_setting

from dq_plugins.quantized.candidates import Candidates, Entry
from dq_plugins.quantized.width import Width, entries_of, widths_of


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
