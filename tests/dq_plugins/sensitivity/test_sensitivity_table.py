from __future__ import annotations

import pytest

from dq_plugins.errors import DQError
from dq_plugins.quantized.candidates import Entry
from dq_plugins.sensitivity.sensitivity_table import SensitivityTable, entries_to_check

LAYERS = ("a", "b", "c", "d")


def table(**changes) -> SensitivityTable:
    entries = [Entry(layer, "weight", bits) for layer in LAYERS for bits in (2, 4)]
    noise = {e: 10.0 ** -(i + 1) for i, e in enumerate(entries)}
    return SensitivityTable(**({"noise": noise, "calls": 5.0, "naive_calls": 100.0} | changes))


def test_sqnr_of_an_entry():
    assert table().sqnr(Entry("a", "weight", 4)) == pytest.approx(20)


def test_correction_takes_exact_values_and_scales_the_rest_by_width():
    exact = {Entry("a", "weight", 2): 0.3, Entry("b", "weight", 4): 0.5e-4}
    corrected = table().corrected(exact, calls=8)
    assert corrected.noise[Entry("a", "weight", 2)] == 0.3
    assert corrected.noise[Entry("c", "weight", 2)] == pytest.approx(3e-5)
    assert corrected.noise[Entry("c", "weight", 4)] == pytest.approx(0.5e-6)
    assert corrected.check is not None
    assert corrected.check.typical_ratio == pytest.approx({"weight@2": 3, "weight@4": 0.5})
    assert corrected.check.rank_correlation == pytest.approx(1)
    assert corrected.calls == 13


def test_checked_entries_cover_every_width_from_the_noisiest_on():
    chosen = entries_to_check(table(), 4)
    assert chosen[0] == Entry("a", "weight", 2)
    assert {e.bits for e in chosen} == {2, 4}
    assert len(chosen) == 4


def test_content_layers_are_those_that_move_structure():
    entries = list(table().noise)
    structure = {e: 0.9 if e.layer in "ab" else 0.1 for e in entries}
    measured = table(structure=structure, texture={e: 1 - structure[e] for e in entries})
    assert measured.metric_kinds() == {"a": "content", "b": "content", "c": "quality", "d": "quality"}
    assert measured.metric_kinds("paper", paper=["d"]) == {
        "a": "quality",
        "b": "quality",
        "c": "quality",
        "d": "content",
    }
    assert measured.similarity(entries[0]) == pytest.approx(0)


def test_asking_for_content_that_was_not_measured_says_what_to_do():
    with pytest.raises(DQError, match="content=True"):
        table().metric_kinds()


def test_table_survives_the_plan():
    entries = list(table().noise)
    full = table(structure=dict.fromkeys(entries, 0.25), texture=dict.fromkeys(entries, 0.5)).corrected(
        {entries[0]: 0.3, entries[3]: 0.1}, 2
    )
    assert SensitivityTable.of(full.measured((2, 3), (4,))) == full
