from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_plugins.errors import BudgetError
from dq_plugins.passes.allocation.columns import choice_of, widths_of
from dq_plugins.passes.allocation.problem import AllocationProblem, Budgets, LayerCost, allocate
from dq_plugins.quantized.candidates import Entry
from dq_plugins.quantized.width import Width, WidthChoices

LAYERS = {
    "first": LayerCost(weights=101, inputs=1000, macs=50_000, block="one"),
    "middle": LayerCost(weights=4000, inputs=300, macs=90_000, block="one"),
    "last": LayerCost(weights=700, inputs=0, macs=10_000, block="two"),
}
BITS = (2, 4, 8)


def errors(scale: dict[str, float] | None = None) -> dict[Entry, float]:
    scale = scale or {"first": 40.0, "middle": 3.0, "last": 9.0}
    return {
        Entry(layer, operand, bits): value * (1 if operand == "weight" else 0.3) * 4.0**-bits
        for layer, value in scale.items()
        for operand in ("weight", "activation")
        for bits in BITS
    }


def problem(default: WidthChoices | None = None, **changes) -> AllocationProblem:
    given = {"layers": LAYERS, "errors": errors(), "default_choices": default or WidthChoices(BITS, BITS)} | changes
    return AllocationProblem(**given)


def brute_force(p: AllocationProblem) -> float:
    """Least error over all widths, straight from the definition of the budgets."""
    choices = [[Width(w, a) for w in p.choices_for(n).weight for a in p.choices_for(n).activation] for n in p.layers]
    plans = (dict(zip(p.layers, widths, strict=True)) for widths in itertools.product(*choices))
    errors = (
        sum(p.error(n, "weight", w.weight) + p.error(n, "activation", w.activation) for n, w in plan.items())
        for plan in plans
        if within(p, plan)
    )
    return min(errors, default=float("inf"))


def within(p: AllocationProblem, plan: dict[str, Width]) -> bool:
    rows = [(c, p.bits(plan[n].weight), p.bits(plan[n].activation), n) for n, c in p.layers.items()]
    b, infinity = p.budgets, float("inf")
    members = [(c.weights, w) for c, w, _, _ in rows if c.block == "one"]
    used = [
        (sum(c.weights * w for c, w, _, _ in rows) / sum(c.weights for c, *_ in rows), b.weight_bits),
        (sum(c.inputs * a for c, _, a, _ in rows) / sum(c.inputs for c, *_ in rows), b.act_bits),
        (sum(-(-c.weights * w // 8) for c, w, _, _ in rows), b.bytes),
        (sum(c.macs * w * a for c, w, a, _ in rows), b.bitops),
        (sum(p.latency[n][plan[n]] for *_, n in rows) if p.latency else 0.0, b.latency),
        (sum(n * w for n, w in members) / sum(n for n, _ in members), b.block_bits.get("one")),
    ]
    return all(value <= (infinity if limit is None else limit) for value, limit in used)


LATENCY = {
    name: {Width(w, a): cost.macs * (w or 32) ** 0.5 * (a or 32) ** 0.3 for w in (*BITS, None) for a in (*BITS, None)}
    for name, cost in LAYERS.items()
}


@given(
    weight_bits=st.none() | st.floats(2, 9),
    act_bits=st.none() | st.floats(2, 9),
    size=st.none() | st.integers(1200, 5000),
    bitops=st.none() | st.integers(600_000, 9_600_000),
    latency=st.none() | st.floats(250_000, 900_000),
    cap=st.none() | st.floats(2, 8),
    full=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_any_mix_of_budgets_is_solved_to_the_optimum(weight_bits, act_bits, size, bitops, latency, cap, full):
    blocks = {} if cap is None else {"one": cap}
    budgets = Budgets(
        weight_bits=weight_bits, act_bits=act_bits, bytes=size, bitops=bitops, latency=latency, block_bits=blocks
    )
    choices = WidthChoices((*BITS, None), (*BITS, None)) if full else WidthChoices(BITS, BITS)
    p = problem(choices, budgets=budgets, latency=LATENCY)
    found, best = allocate(p), brute_force(p)
    if best == float("inf"):
        assert found.solution.status == "infeasible"
        assert found.solution.nearest
    else:
        assert found.solution.status == "optimal"
        assert found.error == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_weights_and_inputs_share_one_program_under_bitops():
    tight = allocate(problem(budgets=Budgets(bitops=2_000_000)))
    assert tight.problem.coupled
    widths = tight.widths
    used = sum(
        c.macs * tight.problem.bits(widths[n].weight) * tight.problem.bits(widths[n].activation)
        for n, c in LAYERS.items()
    )
    assert used <= 2_000_000
    assert len({w.weight for w in widths.values()}) > 1


def test_layers_without_input_keep_it_in_full_precision():
    assert allocate(problem(budgets=Budgets(weight_bits=4, act_bits=4))).widths["last"].activation is None


def test_pins_and_choices_of_single_layers_hold():
    found = allocate(problem(choices={"first": WidthChoices((8,), (8,)), "last": WidthChoices((None,), (None,))}))
    assert found.widths["first"] == (8, 8)
    assert found.widths["last"] == (None, None)


def test_full_precision_is_chosen_where_nothing_forbids_it():
    found = allocate(problem(WidthChoices((2, None), (2, None))))
    assert set(found.widths.values()) == {Width(None, None)}
    assert found.error == 0


def test_widths_and_columns_are_inverse():
    for budgets in (Budgets(weight_bits=4), Budgets(bitops=3_000_000)):
        p = problem(budgets=budgets)
        program, columns = p.program()
        widths = {"first": Width(8, 4), "middle": Width(2, 2), "last": Width(4, None)}
        choice = choice_of(program, columns, widths)
        assert widths_of(columns, choice) == widths
        error = sum(p.error(n, "weight", w.weight) + p.error(n, "activation", w.activation) for n, w in widths.items())
        assert program.value(choice) == pytest.approx(error)


def test_widths_that_are_not_among_the_choices_are_refused():
    wrong = {name: Width(3, 4) for name in LAYERS}
    with pytest.raises(BudgetError, match="W3 is not among the choices of layer 'first', which offers: W2, W4, W8"):
        choice_of(*problem().program(), wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": {"frist": WidthChoices()}}, "'frist' is not a layer.*did you mean 'first'"),
        ({"default_choices": WidthChoices((3,), BITS)}, "3-bit weights.*not measured"),
        ({"budgets": Budgets(latency=5.0)}, "latency table has no time of layer 'first'"),
        ({"budgets": Budgets(block_bits={"three": 4.0})}, "no block 'three'.*one, two"),
    ],
)
def test_contradictions_name_the_culprit(changes, message: str):
    with pytest.raises(BudgetError, match=message):
        allocate(problem(**changes))


@pytest.mark.parametrize("width", [Width(4, 8), Width(4, None), Width(None, 8), Width(None, None)])
def test_widths_print_and_parse(width: Width):
    assert Width.parse(str(width)) == width


@pytest.mark.parametrize("text", ["", "4", "A8W4", "W4A", "float"])
def test_what_is_no_width_is_refused(text: str):
    with pytest.raises(BudgetError, match="is not a pair of widths"):
        Width.parse(text)


def test_scales_of_groups_count_as_bytes() -> None:
    layers = {"a": LayerCost(64, 0, 100, group_scale_bytes={4: 9})}
    given = problem(WidthChoices((4, 8), (8,)), layers=layers, errors=errors({"a": 1.0}), budgets=Budgets(bytes=1000))
    program, columns = given.program()
    (budget,) = program.budgets
    assert {c.width.weight: cost for c, cost in zip(columns, budget.cost, strict=True)} == {4: 32 + 9, 8: 64}


def test_products_of_an_attention_are_of_its_operands_and_of_eight_bit_probabilities():
    cost = LayerCost(0, 300, 1000, value_macs=400)
    assert cost.bit_operations(Width(None, 4), 32) == 600 * 4 * 4 + 400 * 8 * 4
    assert cost.bit_operations(Width(None, 8), 32) == 1000 * 8 * 8
    assert cost.bit_operations(Width(), 32) == 1000 * 32 * 32
    assert LayerCost(5, 300, 1000).bit_operations(Width(4, None), 16) == 1000 * 4 * 16
