import pytest
import torch
from denoisers import recorded, tiny_denoiser

import dq_plugins as dq
from dq_plugins.metrics.output_error import output_sqnr
from dq_plugins.passes.rounding import block_reconstruction
from dq_plugins.recipe import Recipe, Step

TEMPORAL = {"p", "q", "body.0.beta", "body.1.beta"}
FAST = {"iterations": 60, "calls": 5}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    return denoiser, recorded(denoiser, tmp_path_factory.mktemp("calib"), batch=4)


def make(case, *steps: Step, **options) -> dq.QuantPlan:
    recipe = Recipe("r", "", (Step("weight-ranges"), *steps))
    return dq.make_plan(*case, recipe, weight_bits=3, act_bits=None, edge_bits=3, progress=False, **options)


def sqnr(case, plan: dq.QuantPlan) -> float:
    values = output_sqnr(dq.apply(case[0], plan, backend="simulate"), case[1]).values()
    return sum(values) / len(values)


def test_output_error_falls_below_nearest_rounding(case) -> None:
    learned = make(case, Step("block-reconstruction", {"iterations": 300, "calls": 5}))
    assert sqnr(case, learned) > sqnr(case, make(case)) + 1.2


def test_temporal_rounding_stays_bit_for_bit(case) -> None:
    temporal = Step("temporal-reconstruction", {"iterations": 50})
    before, after = make(case, temporal), make(case, temporal, Step("block-reconstruction", FAST))
    for name in TEMPORAL:
        weight = case[0].get_submodule(name).weight
        assert torch.equal(before.layers[name].weight.quantize(weight), after.layers[name].weight.quantize(weight))
    changed = [n for n, layer in after.layers.items() if n not in TEMPORAL and layer.weight.codes is not None]
    assert changed
    assert set(after.sections["block-reconstruction"].data["frozen"]) == TEMPORAL


def test_without_freezing_the_embedding_layers_are_learned_with_their_block(case) -> None:
    plan = make(case, Step("block-reconstruction", {**FAST, "freeze_temporal": False}))
    assert plan.sections["block-reconstruction"].data["frozen"] == []


def test_blocks_are_the_residual_ones_and_no_block_gets_worse(case) -> None:
    blocks = make(case, Step("block-reconstruction", FAST)).sections["block-reconstruction"].data["blocks"]
    assert list(blocks) == ["enter", "body.0", "body.1", "leave"]
    assert all(b["kept_start"] or b["learned"] < b["start"] for b in blocks.values())


def test_blocks_of_one_size_see_the_calls_in_orders_of_their_own(case, monkeypatch) -> None:
    orders: list[tuple[int, ...]] = []
    randint = torch.randint

    def remembered(*args, **kwargs):
        drawn = randint(*args, **kwargs)
        orders.append(tuple(drawn.tolist()))
        return drawn

    monkeypatch.setattr(torch, "randint", remembered)
    make(case, Step("block-reconstruction", FAST))
    assert len(set(orders)) == len(orders) == 4


def test_resumes_block_by_block_to_the_same_plan(case, tmp_path, monkeypatch) -> None:
    whole = make(case, Step("block-reconstruction", FAST))
    learned = []
    learn = block_reconstruction.BlockReconstruction.learn

    def interrupted(self, cache, *rest):
        if len(learned) == 2:
            raise KeyboardInterrupt
        learned.append(cache.unit.module)
        return learn(self, cache, *rest)

    monkeypatch.setattr(block_reconstruction.BlockReconstruction, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(case, Step("block-reconstruction", FAST), workdir=tmp_path)
    monkeypatch.setattr(
        block_reconstruction.BlockReconstruction,
        "learn",
        lambda self, cache, *rest: (learned.append(cache.unit.module), learn(self, cache, *rest))[1],
    )
    assert make(case, Step("block-reconstruction", FAST), workdir=tmp_path) == whole
    assert learned == ["enter", "body.0", "body.1", "leave"]


def with_activations(case, **options) -> dq.QuantPlan:
    steps = (Step("weight-ranges"), Step("activation-ranges"), Step("block-reconstruction", {**FAST, **options}))
    return dq.make_plan(*case, Recipe("r", "", steps), weight_bits=3, act_bits=3, edge_bits=3, progress=False)


def test_narrow_activations_are_quantized_while_rounding_is_learned(case) -> None:
    inside, outside = (
        with_activations(case, **chosen).sections["block-reconstruction"].data["blocks"]
        for chosen in ({}, {"quantize_inputs": False})
    )
    assert all(inside[name]["start"] > outside[name]["start"] for name in inside)
    assert not any(module._forward_pre_hooks for module in case[0].modules())


def test_activations_of_8_bits_are_left_alone_while_rounding_is_learned(case) -> None:
    def codes(plan: dq.QuantPlan) -> list[torch.Tensor | None]:
        return [layer.weight.codes for layer in plan.layers.values()]

    recipe = Recipe("r", "", (Step("weight-ranges"), Step("activation-ranges"), Step("block-reconstruction", FAST)))
    plans = [
        dq.make_plan(*case, recipe, weight_bits=3, options={"block-reconstruction": chosen}, progress=False)
        for chosen in ({}, {"quantize_inputs": False}, {"quantize_inputs": True})
    ]
    default, without, with_them = ([c for c in codes(plan) if c is not None] for plan in plans)
    assert all(torch.equal(a, b) for a, b in zip(default, without, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(default, with_them, strict=False))


def test_wide_weights_keep_their_rounding(case) -> None:
    blocks = Step("block-reconstruction", {**FAST, "most_bits": 3})
    recipe = Recipe("r", "", (Step("weight-ranges"), Step("activation-ranges"), blocks))
    plan = dq.make_plan(*case, recipe, weight_bits=3, edge_bits=8, progress=False)
    found = plan.sections["block-reconstruction"].data["blocks"]
    assert "body.0" in found
    assert "enter" not in found  # 8 bits


def test_balanced_layers_are_learned_as_what_they_compute(case) -> None:
    steps = (Step("channel-balance", {"least_gain": 0.0}), Step("weight-ranges"), Step("activation-ranges"))
    plain, learned = (
        dq.make_plan(*case, Recipe("r", "", recipe), weight_bits=3, progress=False)
        for recipe in (steps, (*steps, Step("block-reconstruction", {**FAST, "iterations": 150})))
    )
    assert any(layer.balance is not None for layer in learned.layers.values())
    assert sqnr(case, learned) > sqnr(case, plain)
