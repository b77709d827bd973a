"""The code blocks of docs/brevitas.md, run in order."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from dq_brevitas.proxy import timestep_proxies

from dq_plugins.testing.denoiser import TinyDenoiser
from dq_plugins.testing.plans import handmade_plan

PAGE = (Path(__file__).parents[3] / "docs" / "brevitas.md").read_text()
BLOCKS = re.findall(r"<!-- test: (\w+)(?: `([^`]+)`)? -->\n```python\n(.*?)```", PAGE, re.DOTALL)


def block(kind: str) -> list[tuple[str, str]]:
    return [(old, code) for found, old, code in BLOCKS if found == kind]


@pytest.fixture
def names(calls, tmp_path):
    full = TinyDenoiser()
    return {
        "denoiser": TinyDenoiser(),
        "calibration": calls,
        "training": calls,
        "target": lambda **batch: full(**batch).detach(),
        "plan_denoiser": TinyDenoiser(),
        "plan": handmade_plan(TinyDenoiser()),
        "folder": tmp_path,
        "example": calls[0],
    }


def test_every_block_of_the_page_is_run():
    assert len(BLOCKS) == PAGE.count("```python") == 8


def test_the_page_can_be_followed_by_hand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for kind in ("given", "stock"):
        ((_, code),) = block(kind)
        exec(code, names)
    names["stock_model"] = copy.deepcopy(names["model"]).eval()
    for _, code in block("run"):
        exec(code, names)
    assert names["trained_plan"].layers.keys() == names["plan"].layers.keys()
    assert torch.equal(names["again"](**names["example"]), names["quantized"](**names["example"]))


def test_two_lines_make_a_stock_script_timestep_aware(names, calls):
    ((_, script),) = block("stock")
    stock = dict(names)
    exec(script, stock)
    changed = script
    for old, new in block("replace"):
        assert changed.count(old) == 1
        changed = changed.replace(old, new.strip())
    differing = [a for a, b in zip(script.splitlines(), changed.splitlines(), strict=True) if a != b]
    assert len(differing) == 2
    grouped = dict(names, denoiser=TinyDenoiser())
    exec(changed, grouped)
    assert not timestep_proxies(stock["model"])
    assert {len(p.scale_table()) for p in timestep_proxies(grouped["model"]).values()} == {4}
    full = TinyDenoiser()

    def worst(model):
        with torch.no_grad():
            return max((model(**c) - full(**c)).square().mean() / full(**c).square().mean() for c in calls)

    assert worst(grouped["model"].eval()) < worst(stock["model"].eval())


def test_the_other_blocks_run_in_order(names, calls):
    ((_, script),) = block("stock")
    exec(script, names)
    names["stock_model"] = copy.deepcopy(names["model"]).eval()
    for _, code in [*block("run"), *block("export")]:
        exec(code, names)
    for call in calls:
        assert torch.equal(names["again"](**call), names["quantized"](**call))
        torch.testing.assert_close(names["simulated"](**call), names["quantized"](**call), rtol=0, atol=1e-4)
        assert torch.equal(names["program"].module()(**call), names["quantized"](**call))
    assert (names["folder"] / "model.onnx").is_file()
