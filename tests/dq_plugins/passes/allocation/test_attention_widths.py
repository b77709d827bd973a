"""Widths of attentions, chosen by the program that chooses those of layers."""

from __future__ import annotations

from itertools import product

import pytest
from attention_models import RECIPE, attention_calls_recorded, attention_inputs, loud_keys_denoiser

import dq_plugins as dq
from dq_plugins.errors import BudgetError
from dq_plugins.passes.allocation.findings import explanation, find
from dq_plugins.plan import MeasuredSensitivity
from dq_plugins.quantized.attention import site_name
from dq_plugins.recipe import Recipe, Step
from dq_plugins.sensitivity.exact_noise import noise_and_signal

NEAR, FAR = site_name("near"), site_name("far")
QUERIES, CHANNELS, BATCH = 36, 24, 3
PRODUCTS = {NEAR: BATCH * QUERIES * 36 * CHANNELS, FAR: BATCH * QUERIES * 7 * CHANNELS}
"""MACs of one of the two products of each."""
CHOICES = (4, 6, 8, None)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = loud_keys_denoiser("near")
    return denoiser, attention_calls_recorded(denoiser, tmp_path_factory.mktemp("calib")), tmp_path_factory.mktemp("w")


def layers_of(case) -> dict[str, int]:
    return {name: info.macs for name, info in dq.partition(case[0], attention_inputs()).layers.items()}


def made(case, **allocation) -> dq.QuantPlan:
    """Every layer W8A8, so that attentions alone are decided about; noise of the output as the objective."""
    measured = Step("sensitivity", {"weight_choices": (8,), "act_choices": (4, 6, 8), "draws": 160, "image": False})
    options = {"pinned": dict.fromkeys(layers_of(case), "W8A8"), "full_precision": True, **allocation}
    recipe = Recipe("r", "", (*RECIPE.steps, measured, Step("bit-allocation", options)))
    return dq.make_plan(*case[:2], recipe, progress=False)


def bit_operations(case, widths: dict[str, int | None]) -> float:
    found = 64.0 * sum(layers_of(case).values())
    for name, bits in widths.items():
        operand, probability = (32, 32) if bits is None else (bits, 8)
        found += PRODUCTS[name] * operand * (operand + probability)
    return found


def chosen(plan: dq.QuantPlan) -> dict[str, int | None]:
    return {site_name(n): a.query.bits if a.quantized else None for n, a in plan.attention.items()}


def error(sensitivity: MeasuredSensitivity, widths: dict[str, int | None]) -> float:
    return sum(sensitivity.noise[name]["activation"][bits] for name, bits in widths.items() if bits is not None)


@pytest.mark.parametrize("widest", [(4, 4), (6, 6), (8, 4), (8, 8), (None, 4), (None, None)])
def test_the_program_finds_what_trying_everything_finds(case, widest: tuple[int | None, int | None]) -> None:
    limit = bit_operations(case, dict(zip((NEAR, FAR), widest, strict=True)))
    plan = made(case, bitops=limit)
    every = [dict(zip((NEAR, FAR), widths, strict=True)) for widths in product(CHOICES, CHOICES)]
    allowed = [widths for widths in every if bit_operations(case, widths) <= limit]
    best = min(allowed, key=lambda widths: error(plan.sensitivity, widths))
    assert chosen(plan) == best
    (used,) = find(plan).budgets
    assert used.used == pytest.approx(bit_operations(case, best))
    assert used.limit == limit


def test_the_sensitive_attention_gets_the_bits(case) -> None:
    limit = bit_operations(case, {NEAR: 8, FAR: 4})
    plan = made(case, bitops=limit)
    assert chosen(plan)[NEAR] == 8
    assert chosen(plan)[FAR] < 8
    narrow = made(case, bitops=limit, pinned={**dict.fromkeys(layers_of(case), "W8A8"), NEAR: "A4", FAR: "A8"})
    assert chosen(narrow) == {NEAR: 4, FAR: 8}

    def noise(of: dq.QuantPlan) -> float:
        return noise_and_signal(dq.apply(case[0], of, "simulate"), case[1].calls())[0]

    assert noise(plan) < 0.5 * noise(narrow)
    assert any(line.startswith(f"{NEAR}.activation") for line in explanation(plan).splitlines())


def test_where_attention_counts_in_no_budget_it_keeps_the_widths_of_the_plan(case) -> None:
    before = made(case, bitops=1e12, full_precision=False)
    assert chosen(before) == {NEAR: 8, FAR: 8}
    for budget in ({}, {"act_bits": 6.0, "pinned": {}}, {"bytes": 1e6}):
        plan = made(case, full_precision=False, **budget)
        assert chosen(plan) == {NEAR: 8, FAR: 8}
        assert not {NEAR, FAR} & find(plan).widths.keys()
        assert {NEAR, FAR} <= plan.sensitivity.noise.keys()


def test_a_latency_table_that_has_an_attention_decides_about_it(case) -> None:
    table = {name: {"W8A8": 1.0} for name in layers_of(case)}
    table[NEAR] = {"A4": 1.0, "A6": 2.0, "A8": 3.0, "full precision": 9.0}
    within = 1.0 * len(layers_of(case))
    plan = made(case, latency=within + 2.5, latency_table=table)
    assert chosen(plan) == {NEAR: 6, FAR: 8}
    assert FAR not in find(plan).widths
    with pytest.raises(BudgetError, match="nearest budget that can be met"):
        made(case, latency=within + 0.5, latency_table=table)


def test_the_plan_survives_the_disk(case, tmp_path) -> None:
    plan = made(case, bitops=bit_operations(case, {NEAR: None, FAR: 6}))
    assert chosen(plan) == {NEAR: None, FAR: 6}
    assert plan.attention["near"].unquantized_reason.code == "allocated"
    assert dq.QuantPlan.load(plan.save(tmp_path)) == plan
    assert "1 attention full precision: bit allocation leaves it" in str(plan)
    assert "1 attention A6" in str(plan)
