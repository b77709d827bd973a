from __future__ import annotations

import json

import pytest
from odd_denoisers import Obelisk
from torch import nn

from dq_plugins.graph import partition, summarise


@pytest.fixture(scope="module")
def summary() -> dict:
    model = Obelisk()
    model.forgotten = nn.Linear(10, 10)
    return summarise(partition(model, Obelisk.inputs()))


def test_the_summary_is_json(summary):
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_parameters_are_counted(summary):
    assert summary["parameters"] == 110 + sum(p.numel() for p in Obelisk().parameters())
    assert summary["signatures"]["temporal"]["parameters"] == 16 * 16 + 16


def test_macs_add_up_and_attention_is_counted_apart(summary):
    assert summary["macs"]["layers"] == sum(row["macs"] for row in summary["layers"].values())
    assert summary["macs"]["attention"] == 2 * 2 * 2 * 4 * 4 * 16  # two slabs, two products, batch 2, 4 tokens
    assert summary["macs"]["total"] == summary["macs"]["layers"] + summary["macs"]["attention"]


def test_layers_are_listed_by_role_and_by_name(summary):
    assert summary["roles"]["mixed"] == ["slabs.0.mod", "slabs.1.mod"]
    assert summary["layers"]["what"]["kind"] == "embedding"
    assert summary["block_boundary"][0]["layer"] == "when"
    assert summary["inputs"]["kind"] == {"shape": [2], "dtype": "int64"}
