from __future__ import annotations

import itertools

import numpy as np
import pytest

from dq_plugins.passes.allocation.problem import AllocationProblem, Budgets, LayerCost, allocate, allocate_image
from dq_plugins.quantized.candidates import Entry
from dq_plugins.quantized.width import Width, WidthChoices, entries_of
from dq_plugins.sensitivity.drift import ImageError

BITS, MEAN = (2, 4, 8), 4.5
LAYERS = {name: LayerCost(100 * (i + 1), 0, 1000) for i, name in enumerate("abcdef")}


def planted(seed: int) -> ImageError:
    """Six layers whose drifts have either sign."""
    rng = np.random.default_rng(seed)
    random, drift = {}, {}
    for name in LAYERS:
        strength, direction = rng.uniform(0.5, 2), rng.normal(size=2)
        for bits in BITS:
            entry = Entry(name, "weight", bits)
            random[entry] = strength * 4.0**-bits
            drift[entry] = tuple(float(v) * 2.0**-bits for v in direction)
    return ImageError(random, drift)


def problem() -> AllocationProblem:
    return AllocationProblem(
        LAYERS, {}, default_choices=WidthChoices(BITS, (None,)), budgets=Budgets(weight_bits=MEAN), float_bits=32
    )


def best(image: ImageError) -> float:
    limit = MEAN * sum(cost.weights for cost in LAYERS.values())
    plans = (dict(zip(LAYERS, bits, strict=True)) for bits in itertools.product(BITS, repeat=len(LAYERS)))
    fitting = (p for p in plans if sum(LAYERS[n].weights * bits for n, bits in p.items()) <= limit)
    return min(image.of(Entry(n, "weight", bits) for n, bits in plan.items()) for plan in fitting)


def test_solving_again_around_the_answer_comes_close_to_the_optimum():
    shares, plain = [], []
    for seed in range(12):
        image = planted(seed)
        once = allocate(AllocationProblem(**{**vars(problem()), "errors": image.alone()}))
        found = image.of(entries_of(allocate_image(problem(), image).widths))
        optimum = best(image)
        assert optimum <= found + 1e-12
        shares.append(found / optimum)
        plain.append(image.of(entries_of(once.widths)) / optimum)
    assert max(shares) < 2
    assert np.mean(np.log(shares)) < np.mean(np.log(plain))
    assert np.median(shares) == pytest.approx(1, abs=0.1)


def test_the_answer_holds_what_each_change_of_one_layer_would_do():
    image = planted(0)
    found = allocate_image(problem(), image)
    chosen = found.widths
    for name, bits in itertools.product(LAYERS, BITS):
        other = {**chosen, name: Width(bits)}
        predicted = found.problem.errors[Entry(name, "weight", bits)]
        now = found.problem.errors[Entry(name, "weight", chosen[name].weight)]
        difference = image.of(entries_of(other)) - image.of(entries_of(chosen))
        assert predicted - now == pytest.approx(difference, abs=1e-12)


def test_edges_get_their_least_width_in_every_rule():
    narrow = problem().with_least(["a", "f"], 8)
    assert narrow.choices_for("a").weight == (8,)
    assert narrow.choices_for("b").weight == BITS
    assert problem().with_least(["a"], 16).choices_for("a").weight == (8,)
    widths = allocate_image(narrow, planted(1)).widths
    assert widths["a"].weight == widths["f"].weight == 8
