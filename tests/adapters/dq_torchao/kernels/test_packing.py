from __future__ import annotations

import gc

import torch
from dq_torchao.kernels.packing import PackedWeights


def test_packs_once_per_layout():
    cache, weight, packed = PackedWeights(), torch.ones(2), []
    for layout in ("a", "b", "a"):
        cache.get(weight, layout, lambda layout=layout: packed.append(layout) or layout)
    assert packed == ["a", "b"]


def test_packs_again_after_a_change_in_place():
    cache, weight = PackedWeights(), torch.ones(2)
    before = cache.get(weight, "a", weight.clone)
    weight.add_(1)
    assert not torch.equal(before, cache.get(weight, "a", weight.clone))


def test_equal_weights_do_not_share():
    cache, one, other = PackedWeights(), torch.ones(2), torch.ones(2)
    assert cache.get(one, "a", lambda: 1) == 1
    assert cache.get(other, "a", lambda: 2) == 2


def test_forgets_dead_weights():
    cache, weight = PackedWeights(), torch.ones(2)
    cache.get(weight, "a", lambda: 1)
    assert len(cache) == 1
    del weight
    gc.collect()
    assert len(cache) == 0


def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        weight = torch.ones(2)
    assert PackedWeights().get(weight, "a", lambda: 1) == 1
