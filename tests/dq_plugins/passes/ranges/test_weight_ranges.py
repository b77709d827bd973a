from __future__ import annotations

from pathlib import Path

import torch
from denoisers import class_denoiser, recorded_classes

import dq_plugins as dq
from dq_plugins.recipe import Recipe, Step


def widths(folder: Path, edge_bits: int | None = None, **options: int) -> dict[str, int]:
    denoiser = class_denoiser()
    calls = recorded_classes(denoiser, folder)
    recipe = Recipe("r", "", (Step("weight-ranges", options),))
    plan = dq.make_plan(denoiser, calls, recipe, weight_bits=4, act_bits=None, edge_bits=edge_bits, progress=False)
    return {name: layer.weight.bits for name, layer in plan.layers.items() if layer.weight is not None}


def test_embedding_tables_have_a_least_width_of_their_own(tmp_path: Path) -> None:
    plain, spared = widths(tmp_path), widths(tmp_path, embedding_bits=8)
    assert plain["table"] == 4
    assert spared == plain | {"table": 8}


def test_a_least_width_takes_nothing_away(tmp_path: Path) -> None:
    assert widths(tmp_path, embedding_bits=2, edge_bits=2) == dict.fromkeys(widths(tmp_path), 4)


def test_scales_that_are_chosen_later_are_not_searched_for(tmp_path: Path) -> None:
    denoiser = class_denoiser()
    calls = recorded_classes(denoiser, tmp_path)

    def scales(method: str) -> dict[str, torch.Tensor]:
        recipe = Recipe("r", "", (Step("weight-ranges", {"method": method}),))
        plan = dq.make_plan(denoiser, calls, recipe, weight_bits=4, act_bits=None, progress=False)
        return {name: layer.weight.scale for name, layer in plan.layers.items() if layer.weight is not None}

    later, minmax, searched = scales("later"), scales("minmax"), scales("shrink")
    assert torch.equal(later["table"], searched["table"])
    assert not torch.equal(minmax["table"], searched["table"])
    assert all(torch.equal(later[name], minmax[name]) for name in later.keys() - {"table"})
