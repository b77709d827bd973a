from __future__ import annotations

import copy

import pytest
import torch
from denoisers import TinyDenoiser, recorded
from torch import nn

import dq_plugins as dq
from dq_plugins.metrics.output_error import output_sqnr
from dq_plugins.passes.image_errors import errors_by_layer
from dq_plugins.plan import Subspace, Targets
from dq_plugins.progress import finish
from dq_plugins.recipe import PassContext, Recipe, Step

OF_THE_WEIGHT = {"methods": ("weight", "weighted-error")}
AFTER = (Step("weight-ranges"), Step("timestep-groups", {"groups": 3}), Step("activation-ranges"))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    torch.manual_seed(0)
    denoiser = TinyDenoiser(width=16).eval().requires_grad_(False)
    return denoiser, recorded(denoiser, tmp_path_factory.mktemp("calib"), batch=16)


def make(case, *steps: Step, act_bits: int | None = 4, **options) -> dq.QuantPlan:
    recipe = Recipe("r", "", steps)
    return dq.make_plan(*case, recipe, weight_bits=3, act_bits=act_bits, edge_bits=3, progress=False, **options)


def sqnr(case, plan: dq.QuantPlan) -> float:
    values = output_sqnr(dq.apply(copy.deepcopy(case[0]), plan, backend="simulate"), case[1]).values()
    return sum(values) / len(values)


def branched(plan: dq.QuantPlan) -> set[str]:
    return {name for name, layer in plan.layers.items() if layer.low_rank is not None}


def split(plan: dq.QuantPlan) -> set[str]:
    return {name for name, layer in plan.layers.items() if layer.subspace is not None}


def test_fewer_bits_lose_less(case) -> None:
    plan = make(case, Step("low-rank", {"ranks": (4,), "most": 0.6, **OF_THE_WEIGHT}), *AFTER)
    assert branched(plan)
    assert {plan.layers[name].low_rank.rank for name in branched(plan)} == {4}
    assert sqnr(case, plan) > sqnr(case, make(case, *AFTER)) + 0.5


def test_principal_directions_are_taken_where_they_lose_less(case) -> None:
    plan = make(case, Step("low-rank", {"ranks": (4,), "most": 0.6}), *AFTER)
    assert split(plan)
    assert not split(plan) & branched(plan)
    assert {plan.layers[name].subspace.rank for name in split(plan)} == {4}
    assert sqnr(case, plan) > sqnr(case, make(case, Step("low-rank", {"ranks": (4,), **OF_THE_WEIGHT}), *AFTER)) + 1


def test_in_8_bits_it_takes_half_the_bytes_and_serves_as_well(case) -> None:
    plans = [
        make(case, Step("low-rank", {"ranks": (4,), "most": 0.6, "bits": bits, **OF_THE_WEIGHT}), *AFTER)
        for bits in (16, 8)
    ]
    assert branched(plans[0]) == branched(plans[1])
    sizes = [sum(plan.layers[name].low_rank.nbytes for name in branched(plan)) for plan in plans]
    assert sizes[1] < 0.6 * sizes[0]
    assert sqnr(case, plans[1]) > sqnr(case, plans[0]) - 0.2


def test_layers_too_small_have_none(case) -> None:
    assert not branched(make(case, Step("low-rank", {"ranks": (16,)}), *AFTER))


@pytest.mark.parametrize("methods", [("principal",), ("weight", "weighted-error")])
@pytest.mark.parametrize("act_bits", [4, None])
def test_stacked_saved_resumed_and_in_integers(case, act_bits, methods, tmp_path) -> None:
    steps = (
        Step("channel-balance", {"least_gain": 0.0}),
        Step("rotation", {"least_gain": 0.0}),
        Step("low-rank", {"ranks": (2,), "least_gain": 0.0, "bits": 16 if act_bits else 8, "methods": methods}),
        Step("weight-ranges"),
        Step("gptq"),
        *(AFTER[1:] if act_bits else ()),
        *((Step("bias-correction"), Step("learned-ranges", {"passes": 0.2})) if act_bits else ()),
    )
    form = {"act_bits": act_bits, "weight_group_size": 8}
    plan = make(case, *steps, workdir=tmp_path / "work", **form)
    assert split(plan) if methods == ("principal",) else branched(plan)
    assert make(case, *steps, workdir=tmp_path / "work", **form).hash == plan.hash
    plan.save(tmp_path / "plan")
    plan = dq.QuantPlan.load(tmp_path / "plan")
    integer = dq.apply(copy.deepcopy(case[0]), plan, backend="torchao")
    call = next(iter(case[1].calls()))
    with torch.no_grad():
        found, expected = (call.run(m) for m in (integer, dq.apply(copy.deepcopy(case[0]), plan, backend="simulate")))
    assert float((found - expected).norm() / expected.norm()) < 0.05  # a tie in rounding may fall either way


@pytest.mark.parametrize("methods", [("principal",), ("weight", "weighted-error")])
def test_searches_for_widths_know_the_branch(case, methods) -> None:
    low_rank = Step("low-rank", {"ranks": (2,), "methods": methods})
    steps = (
        low_rank,
        *AFTER,
        Step("sensitivity", {"weight_choices": (3, 8), "act_choices": (4, 8)}),
    )
    plan = make(case, *steps, Step("bit-allocation", {"weight_bits": 5}))
    assert branched(plan) or split(plan)
    assert sqnr(case, plan) > sqnr(case, make(case, low_rank, *AFTER))


@pytest.mark.parametrize(("method", "feature"), [("principal", "subspace"), ("weighted-error", "low_rank")])
def test_others_refuse_by_name(case, method, feature) -> None:
    plan = make(case, Step("low-rank", {"ranks": (2,), "methods": (method,)}), *AFTER)
    with pytest.raises(dq.DQError, match=rf"'brevitas' does not implement {feature} \(layer "):
        dq.apply(copy.deepcopy(case[0]), plan, backend="brevitas")
    with pytest.raises(dq.DQError, match=rf"'PT2E' does not implement {feature} \(layer "):
        plan.refuse_unimplemented((), "PT2E")


def test_wide_first_and_last_layers_have_none(case) -> None:
    recipe = Recipe("r", "", (Step("low-rank", {"ranks": (4,), "most": 0.6, "least_gain": 0.0}), *AFTER))
    plan = dq.make_plan(*case, recipe, weight_bits=3, act_bits=4, edge_bits=16, progress=False)
    assert branched(plan) | split(plan)
    for name in branched(plan) | split(plan):
        assert not plan.layers[name].roles & {"first", "last"}


def test_bytes_are_shared_out_exactly(case) -> None:
    options = {"ranks": (1, 2, 4), "most": 0.6, "least_gain": 0.0}

    def bytes_of(plan: dq.QuantPlan) -> int:
        weights = {name: case[0].get_submodule(name).weight for name in split(plan)}
        kept = sum(plan.layers[name].subspace.nbytes(weight) for name, weight in weights.items())
        return kept + sum(plan.layers[name].low_rank.nbytes for name in branched(plan))

    unlimited = bytes_of(make(case, Step("low-rank", options | {"bytes": 10**9})))
    for share in (0.0, 0.3, 0.7):
        plan = make(case, Step("low-rank", options | {"bytes": int(share * unlimited)}))
        assert bytes_of(plan) <= share * unlimited
        assert bool(branched(plan) | split(plan)) == (share > 0)
    weights = make(case, *AFTER).layers
    codes = sum(p.weight.bits * case[0].get_submodule(n).weight.numel() / 8 for n, p in weights.items())
    of_codes = make(case, Step("low-rank", options | {"share": 0.7 * unlimited / codes}))
    ranks = [[(each.low_rank or each.subspace) for each in found.layers.values()] for found in (plan, of_codes)]
    assert [each and each.rank for each in ranks[0]] == [each and each.rank for each in ranks[1]]
    assert bytes_of(make(case, Step("low-rank", options | {"share": 0.5, "bytes": 0}))) == 0  # the smaller of the two
    both = [layer.low_rank or layer.subspace for layer in plan.layers.values()]
    assert len({branch.rank for branch in both if branch is not None}) > 1


def test_bytes_go_to_the_layers_whose_errors_reach_the_image(tmp_path) -> None:
    """Of two alike blocks one is multiplied by a thousandth before it reaches the output."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.faint, self.loud = nn.Linear(24, 24), nn.Linear(24, 24)
            self.loud.load_state_dict(self.faint.state_dict())

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            x = sample + timestep[:, None, None] * 0.01
            return 1e-3 * self.faint(x) + self.loud(x + 0)

    def sample(denoiser, steps=(9.0, 6.0, 3.0)) -> None:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(8, 16, 4, generator=g) @ torch.randn(4, 24, generator=g) + 0.1 * torch.randn(
            8, 16, 24, generator=g
        )
        for t in steps:
            x = 0.9 * x + 0.1 * denoiser(sample=x, timestep=torch.full((8,), t))

    denoiser = Two().eval().requires_grad_(False)
    both = denoiser, dq.record(denoiser, sample, tmp_path, progress=False)
    one = Subspace(torch.zeros(4, 24).half()).nbytes(denoiser.loud.weight)
    options = {"ranks": (4,), "most": 1.0, "bytes": one, "least_gain": 0.0, "methods": ("principal",)}
    plan = make(both, Step("low-rank", options))
    assert split(plan) == {"loud"}
    effects = finish(errors_by_layer(plan, PassContext(*both, Targets(3, 4)), ["faint", "loud"]))
    assert effects["faint"] == pytest.approx(1e-6 * effects["loud"], rel=0.2)


def test_without_a_budget_a_layer_has_the_largest_rank_that_it_has_room_for(case) -> None:
    plan = make(case, Step("low-rank", {"ranks": (1, 2, 4, 64), "least_gain": 0.0}), *AFTER)
    for name in branched(plan) | split(plan):
        layer, weight = plan.layers[name], case[0].get_submodule(name).weight
        room = 0.25 * weight.numel() / (len(weight) + weight[0].numel())
        assert (layer.low_rank or layer.subspace).rank == max(rank for rank in (1, 2, 4) if rank <= room)


def test_time_is_a_limit_and_has_a_price(case) -> None:
    options = {"ranks": (1, 2, 4), "most": 0.6, "least_gain": 0.0}

    def having(**more: float) -> set[str]:
        plan = make(case, Step("low-rank", options | more), *AFTER)
        return branched(plan) | split(plan)

    everywhere = having(bytes=10**9)
    assert having(time=10.0) == having(price=1e-9) == everywhere
    assert not having(time=0.0)
    assert not having(price=1e9)
    assert 0 < len(having(time=0.2)) < len(everywhere)
    assert 0 < len(having(price=0.3)) < len(everywhere)


def test_runs_at_wide_weights_have_a_price_of_their_own_or_no_branch(case) -> None:
    options = {"ranks": (1, 2, 4), "most": 0.6, "least_gain": 0.0, "price": 0.3}

    def having(**more: float) -> set[str]:
        plan = make(case, Step("low-rank", options | more), *AFTER)  # weights of 3 bits
        return branched(plan) | split(plan)

    narrow = having()
    assert having(wide_price=1e9) == narrow
    assert having(price=1e9, most_bits=2, wide_price=0.3) == narrow
    assert not having(most_bits=2)
    assert len(having(most_bits=2, wide_price=1e-9)) > len(narrow)


def test_wider_layers_of_a_narrow_run_have_none(case) -> None:
    step = Step("low-rank", {"ranks": (1, 2, 4), "most": 0.6, "least_gain": 0.0, "wide_price": 1e-9})
    plan = dq.make_plan(*case, Recipe("r", "", (step, *AFTER)), weight_bits=3, act_bits=4, edge_bits=8, progress=False)
    edges = {name for name, layer in plan.layers.items() if layer.roles & {"first", "last"}}
    assert branched(plan) | split(plan)
    assert edges
    assert not (branched(plan) | split(plan)) & edges
