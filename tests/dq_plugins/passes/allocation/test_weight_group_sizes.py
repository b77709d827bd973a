from __future__ import annotations

import copy
import itertools

import pytest
import torch
from denoisers import TinyDenoiser, recorded

import dq_plugins as dq
from dq_plugins.errors import RecipeError
from dq_plugins.passes.allocation.weight_group_sizes import GroupOffer, WeightGroupSizes
from dq_plugins.plan import WeightQuant
from dq_plugins.recipe import Recipe, Step

SIZES = {"sizes": (8, 16, 32), "calls": 4}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    torch.manual_seed(0)
    denoiser = TinyDenoiser(width=32).eval().requires_grad_(False)
    with torch.no_grad():  # some layers have few large weights, others none
        for place, module in enumerate(denoiser.modules()):
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dim() > 1 and place % 2:
                weight[:, :4] *= 8
    return denoiser, recorded(denoiser, tmp_path_factory.mktemp("calib"))


def make(case, *steps: Step, **options) -> dq.QuantPlan:
    recipe = Recipe("r", "", (Step("weight-ranges"), *steps))
    return dq.make_plan(*case, recipe, weight_bits=3, act_bits=None, edge_bits=3, progress=False, **options)


def bytes_of(plan: dq.QuantPlan) -> int:
    return sum(GroupOffer(0.0, layer.weight).bytes for layer in plan.layers.values() if layer.weight is not None)


def groups_of(plan: dq.QuantPlan) -> dict[str, int]:
    quants = {name: layer.weight for name, layer in plan.layers.items() if layer.weight is not None}
    return {name: 1 if q.group_scale is None else q.group_scale.shape[1] for name, q in quants.items()}


def test_within_the_bytes_of_one_size_for_all_the_bytes_go_where_they_serve(case):
    one = make(case, weight_group_size=16)
    shared = make(case, Step("weight-group-sizes", SIZES), weight_group_size=16)
    assert 0 < bytes_of(shared) <= bytes_of(one)
    section = shared.sections["weight-group-sizes"].data
    assert (section["limit"], section["taken"]) == (bytes_of(one), bytes_of(shared))
    assert len(set(groups_of(shared).values()) - {1}) > 1
    call = next(case[1].calls())
    errors = []
    for plan in (one, shared):
        model = dq.apply(copy.deepcopy(case[0]), plan, backend="simulate")
        errors.append(float((call.run(model) - call.output).square().mean()))
    assert errors[1] < errors[0]


def test_no_bytes_no_groups_and_many_bytes_the_finest(case):
    assert set(groups_of(make(case, Step("weight-group-sizes", SIZES | {"bytes": 0}))).values()) == {1}
    most = groups_of(make(case, Step("weight-group-sizes", SIZES | {"bytes": 10**9})))
    assert most == groups_of(make(case, weight_group_size=8))


def test_the_shares_are_those_of_brute_force():
    g = torch.Generator().manual_seed(0)

    def quant(outputs: int, groups: int) -> WeightQuant:
        scales = None if groups == 1 else torch.ones(outputs, groups, dtype=torch.uint8)
        return WeightQuant(4, torch.ones(outputs), group_scale=scales)

    offers = {}
    for name, outputs in {"a": 10, "b": 40, "c": 25}.items():
        first = float(torch.rand(1, generator=g))
        offers[name] = [GroupOffer(first / (1 + k), quant(outputs, k)) for k in (1, 2, 4, 8)]
    found = WeightGroupSizes(bytes=200)._shared_out(offers, 200)
    chosen = [next(o for o in offers[name] if o.quant is q) for name, q in found.items()]
    feasible = [each for each in itertools.product(*offers.values()) if sum(o.bytes for o in each) <= 200]
    assert sum(o.bytes for o in chosen) <= 200
    best = min(sum(o.error for o in each) for each in feasible)
    assert sum(o.error for o in chosen) == pytest.approx(best, rel=1e-6)


def test_behind_it_come_gptq_and_integers(case, tmp_path):
    steps = (Step("weight-group-sizes", SIZES), Step("gptq", {"calls": 4}))
    plan = make(case, *steps, weight_group_size=16, workdir=tmp_path / "work")
    assert groups_of(plan) == groups_of(make(case, steps[0], weight_group_size=16))
    assert make(case, *steps, weight_group_size=16, workdir=tmp_path / "work") == plan
    plan = dq.QuantPlan.load(plan.save(tmp_path / "plan"))
    call = next(case[1].calls())
    found, expected = (
        call.run(dq.apply(copy.deepcopy(case[0]), plan, backend=backend)) for backend in ("torchao", "simulate")
    )
    assert float((found - expected).norm() / expected.norm()) < 1e-3


def test_nothing_to_share_out_says_so(case):
    with pytest.raises(RecipeError, match="weight_group_size, or the option 'bytes'"):
        make(case, Step("weight-group-sizes"))
