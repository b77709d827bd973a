from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from dq_plugins.graph.partition import LayerInfo
from dq_plugins.passes.rotation.branch_program import Limits, Offer, shared_out, time_of
from dq_plugins.plan import LowRank, Subspace


def branch(rank: int, size: int) -> LowRank:
    return LowRank(torch.zeros(rank, size).half(), torch.zeros(size, rank).half())


def some_offers() -> dict[str, list[Offer]]:
    g = torch.Generator().manual_seed(0)
    offers = {}
    for name, size in {"a": 10, "b": 40, "c": 25, "d": 30}.items():
        error, pace = torch.rand(2, generator=g).tolist()
        branches = [branch(rank, size) for rank in (1, 2, 4)]
        found = [Offer(error / (1 + b.rank), b, b.nbytes, pace * (5 + b.rank)) for b in branches]
        offers[name] = [Offer(error, None), *found]
    return offers


@pytest.mark.parametrize(
    ("limits", "price"),
    [(Limits(500), 0.0), (Limits(None, 0.1), 0.0), (Limits(500, 0.1), 0.0), (Limits(500), 2.0), (Limits(), 2.0)],
)
@pytest.mark.parametrize("image", [None, {"a": 3.0, "b": 0.2, "c": 1.0, "d": 0.5}])
def test_the_shares_are_those_of_brute_force(limits: Limits, price: float, image: dict[str, float] | None) -> None:
    offers, macs = some_offers(), 100.0
    whole = image or {name: each[0].error for name, each in offers.items()}

    def value(chosen: dict[str, Offer]) -> float:
        left = sum(whole[name] * o.error / offers[name][0].error for name, o in chosen.items())
        return math.log(left) + price * sum(o.time for o in chosen.values()) / macs

    def fits(chosen: dict[str, Offer]) -> bool:
        size, time = sum(o.bytes for o in chosen.values()), sum(o.time for o in chosen.values()) / macs
        return (limits.bytes is None or size <= limits.bytes) and (limits.time is None or time <= limits.time)

    found = shared_out(offers, limits, "cp-sat", image=image, price=price, macs=macs)
    chosen = {name: next(o for o in offers[name] if o.branch is b) for name, b in found.items()}
    every = (dict(zip(offers, each, strict=True)) for each in itertools.product(*offers.values()))
    assert fits(chosen)
    assert value(chosen) == pytest.approx(min(value(each) for each in every if fits(each)), abs=1e-5)
    assert any(found.values())


@pytest.mark.parametrize("layer", [nn.Linear(32, 48), nn.Conv2d(16, 24, 3, stride=2, padding=1)])
def test_time_counts_the_products_and_one_more_pass_over_the_input(layer: nn.Module) -> None:
    x = torch.randn(2, 32) if isinstance(layer, nn.Linear) else torch.randn(2, 16, 8, 8)
    outputs, channels, *kernel = layer.weight.shape
    products, count = channels * torch.Size(kernel).numel(), layer(x).numel()
    info = LayerInfo(
        name="",
        kind="",
        type_name="",
        params=0,
        weight_shape=tuple(layer.weight.shape),
        macs=2 * count * products,  # it is used twice
        input_shape=tuple(x.shape),
        output_shape=tuple(layer(x).shape),
        roles=frozenset(),
        signature=None,  # type: ignore[arg-type]
        depends=frozenset(),
        block="",
    )
    into = x.numel() * 3  # to three directions
    of_the_rest = count * 3 * torch.Size(kernel).numel()
    split = Subspace(torch.eye(3, channels).half())
    assert time_of(split, info) == pytest.approx(2 * (2 * into + of_the_rest + 32 * x.numel()))
    low_rank = LowRank(torch.zeros(3, products).half(), torch.zeros(outputs, 3).half())
    down, up = count / outputs * products * 3, count * 3
    assert time_of(low_rank, info) == pytest.approx(2 * (down + up + 32 * x.numel()))


def test_no_layers_no_branches() -> None:
    assert shared_out({}, Limits(0), "cp-sat") == {}
