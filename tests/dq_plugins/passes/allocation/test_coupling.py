from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dq_plugins.errors import BudgetError
from dq_plugins.passes.allocation.coupling import WEIGHT_COUPLINGS, mixdq_widths, scan, score
from dq_plugins.passes.allocation.problem import AllocationProblem, Budgets, LayerCost
from dq_plugins.quantized.candidates import Entry
from dq_plugins.quantized.width import WidthChoices
from dq_plugins.sensitivity.sensitivity_table import SensitivityTable

BITS = (2, 4, 8)


def setting(**budgets):
    rng = np.random.default_rng(1)
    layers = {f"l{i}": LayerCost(int(n), int(m), 100) for i, (n, m) in enumerate(rng.integers(500, 800, (16, 2)))}
    noise, structure, texture = {}, {}, {}
    for i, name in enumerate(layers):
        for operand in ("weight", "activation"):
            for bits in BITS:
                entry = Entry(name, operand, bits)
                noise[entry] = float(np.exp(rng.normal(0, 1)) * 4.0**-bits)
                structure[entry] = noise[entry] * (0.8 if i % 2 else 0.1)
                texture[entry] = noise[entry] * (0.2 if i % 2 else 0.9)
    problem = AllocationProblem(layers, noise, default_choices=WidthChoices(BITS, BITS), budgets=Budgets(**budgets))
    return problem, SensitivityTable(noise, structure, texture)


def test_scores_are_ssim_and_sqnr():
    _, table = setting()
    entry = Entry("l1", "weight", 4)
    assert score(table, entry, "content") == pytest.approx(1 - table.noise[entry])
    assert score(table, entry, "quality") == pytest.approx(-10 * np.log10(table.noise[entry]))


def test_planted_groups_are_found_and_each_keeps_its_own_budget_at_every_coupling():
    problem, table = setting()
    groups = table.metric_kinds()
    assert groups == {f"l{i}": "content" if i % 2 else "quality" for i in range(16)}
    sizes = {g: sum(c.weights for n, c in problem.layers.items() if groups[n] == g) for g in ("content", "quality")}
    ratio, seen = sizes["content"] / sizes["quality"], 0
    for coupling, widths in scan(problem, table, groups, "weight", 4.0, WEIGHT_COUPLINGS):
        quality = 4.0 * (1 + ratio) / (1 + coupling * ratio)
        for group, limit in (("quality", quality), ("content", coupling * quality)):
            bits = sum(problem.layers[n].weights * widths[n] for n in problem.layers if groups[n] == group)
            assert bits <= limit * sizes[group] + 1e-6
        mean = sum(c.weights * widths[n] for n, c in problem.layers.items()) / sum(sizes.values())
        assert 4.0 - 0.8 < mean <= 4.0 + 1e-9  # within a layer's step, of each group
        seen += 1
    assert seen == len(WEIGHT_COUPLINGS)


def test_the_plan_with_the_least_true_error_is_kept_and_equal_plans_are_measured_once():
    problem, table = setting(weight_bits=4.0, act_bits=6.0)
    asked = []

    def true_error(widths):
        asked.append(tuple(sorted(widths.items())))
        return abs(widths["l0"].weight - 2) + sum(w.activation for w in widths.values()) / 1000

    widths, kept = mixdq_widths(problem, table, table.metric_kinds(), true_error)
    assert len(asked) == len(set(asked))
    given_weights = [p for p in map(dict, asked) if all(p[n].weight == w.weight for n, w in widths.items())]
    assert true_error(widths) == min(true_error(p) for p in given_weights)
    assert widths["l0"].weight == min(p["l0"].weight for p in map(dict, asked))
    assert set(kept) == {"weight", "activation"}


def test_other_budgets_are_refused():
    problem, table = setting(weight_bits=4.0, bitops=1e9)
    with pytest.raises(BudgetError, match="bitops needs objective='noise-power'"):
        mixdq_widths(problem, table, table.metric_kinds(), lambda _: 0.0)


def test_a_mean_that_only_equal_shares_can_meet_is_met():
    problem, table = setting(weight_bits=4.0, act_bits=8.0)
    problem = replace(problem, default_choices=WidthChoices(BITS, (8,)))
    widths, kept = mixdq_widths(problem, table, table.metric_kinds(), lambda widths: 0.0)
    assert {w.activation for w in widths.values()} == {8}
    assert kept["activation"] == 1.0


def test_a_mean_below_the_narrowest_width_is_refused():
    problem, table = setting(weight_bits=1.0)
    with pytest.raises(BudgetError, match="no coupling"):
        mixdq_widths(problem, table, table.metric_kinds(), lambda _: 0.0)
