"""MixDQ's own program: content and quality layers apart, each maximising its own score, joined by a scan.

Of one operand (weights, then activations given them), with ``n_c`` and ``n_q`` elements in content and quality layers
and ``r = n_c / n_q``, a mean of ``B`` bits is split with a coupling ``k`` into

    B_q = B (1 + r) / (1 + k r),        B_c = k B_q,

two programs are solved,

    maximise sum SSIM over content layers   within mean bits B_c,
    maximise sum SQNR over quality layers   within mean bits B_q,

for every k of a grid, and of the resulting plans the one with the least error of the final sample is kept.

Source: MixDQ (Zhao et al. 2024), section 3.3 and its code: k in linspace(0.46, 1.36, 10) for weights and
linspace(0.94, 1.09, 20) for activations; the code also lowers B by up to 0.3 bit, which here would only waste budget.
Its weakness: decibels do not add up, so the sum predicts the error of a plan badly; see docs/mixdq.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from dq_plugins.errors import BudgetError
from dq_plugins.passes.allocation.problem import AllocationProblem, Budgets, allocate
from dq_plugins.quantized.candidates import Entry, Operand
from dq_plugins.quantized.width import Width, WidthChoices
from dq_plugins.sensitivity.sensitivity_table import Group, SensitivityTable

WEIGHT_COUPLINGS = tuple(float(k) for k in np.linspace(0.46, 1.36, 10))
ACTIVATION_COUPLINGS = tuple(float(k) for k in np.linspace(0.94, 1.09, 20))

BEST_SQNR = 120.0
"""SQNR in dB that full precision and exact entries count as: more than any width of 16 bits reaches."""


def score(table: SensitivityTable, entry: Entry, group: Group) -> float:
    """What the paper's programs add up: SSIM of content layers, SQNR in dB of quality layers."""
    return table.similarity(entry) if group == "content" else min(table.sqnr(entry), BEST_SQNR)


def scan(
    problem: AllocationProblem,
    table: SensitivityTable,
    groups: Mapping[str, Group],
    operand: Operand,
    mean_bits: float,
    couplings: Sequence[float],
    **options: Any,
) -> Iterator[tuple[float, dict[str, int | None]]]:
    """Solve the two programs of one operand for every coupling k and ``mean_bits`` B.

    Layers and choices are those of ``problem``; its budgets and errors are not used. ``options`` are the solver's.

    Yields:
        Coupling and widths of the operand, by layer; couplings whose budgets cannot be met are passed over.
    """
    layers = {n: c for n, c in problem.layers.items() if _elements(problem, n, operand)}
    sizes = {g: sum(_elements(problem, n, operand) for n in layers if groups[n] == g) for g in ("content", "quality")}
    for coupling in couplings:
        if sizes["quality"] == 0 or sizes["content"] == 0:
            shares: dict[str, float] = dict.fromkeys(("content", "quality"), mean_bits)
        else:
            ratio = sizes["content"] / sizes["quality"]
            quality = mean_bits * (1 + ratio) / (1 + coupling * ratio)
            shares = {"quality": quality, "content": coupling * quality}
        widths: dict[str, int | None] = {}
        for group, bits in shares.items():
            members = [n for n in layers if groups[n] == group]
            solved = _one_group(problem, table, group, operand, members, bits, **options) if members else {}
            if solved is None:
                break
            widths |= solved
        else:
            yield coupling, widths


def _elements(problem: AllocationProblem, layer: str, operand: Operand) -> int:
    cost = problem.layers[layer]
    return cost.weights if operand == "weight" else cost.inputs


def _one_group(
    problem: AllocationProblem,
    table: SensitivityTable,
    group: Any,
    operand: Operand,
    members: Sequence[str],
    mean_bits: float,
    **options: Any,
) -> dict[str, int | None] | None:
    """The program of one group and operand; None when its budget cannot be met."""
    best = 1.0 if group == "content" else BEST_SQNR
    choices, errors = {}, {}
    for name in members:
        widths = getattr(problem.choices_for(name), operand)
        choices[name] = WidthChoices(widths, (None,)) if operand == "weight" else WidthChoices((None,), widths)
        for bits in widths:
            if bits is not None:
                errors[Entry(name, operand, bits)] = best - score(table, Entry(name, operand, bits), group)
    budgets = Budgets(weight_bits=mean_bits) if operand == "weight" else Budgets(act_bits=mean_bits)
    layers = {name: problem.layers[name] for name in members}
    part = AllocationProblem(layers, errors, choices, budgets=budgets, float_bits=problem.float_bits)
    allocation = allocate(part, **options)
    return {n: getattr(w, operand) for n, w in allocation.widths.items()} if allocation.widths else None


def mixdq_widths(
    problem: AllocationProblem,
    table: SensitivityTable,
    groups: Mapping[str, Group],
    true_error: Callable[[Mapping[str, Width]], float],
    **options: Any,
) -> tuple[dict[str, Width], dict[str, float]]:
    """The paper's plan: weights by a scan, then activations given them by another.

    Args:
        problem: layers, choices and the two mean-bits budgets; other budgets are refused.
        table: with content measured.
        groups: content or quality, by layer.
        true_error: measured error of a plan (the paper: pixel error of the final image).
        options: options of the solver.

    Returns:
        Widths of every layer, and the coupling that was kept for each operand.

    Raises:
        BudgetError: another budget is given, or no coupling is feasible.
    """
    others = [n for n in ("bytes", "bitops", "latency") if getattr(problem.budgets, n) is not None]
    if others or problem.budgets.block_bits:
        raise BudgetError(
            f"the paper's objective has budgets of mean bits only; {', '.join(others) or 'block_bits'} needs "
            "objective='noise-power'"
        )
    widths = {n: Width(None, max(problem.choices_for(n).activation, key=problem.bits)) for n in problem.layers}
    operands: tuple[tuple[Operand, float | None, Sequence[float]], ...] = (
        ("weight", problem.budgets.weight_bits, WEIGHT_COUPLINGS),
        ("activation", problem.budgets.act_bits, ACTIVATION_COUPLINGS),
    )
    kept: dict[str, float] = {}
    for operand, mean, couplings in operands:
        bits = float(problem.float_bits) if mean is None else mean
        solve = partial(scan, problem, table, groups, operand, bits, **options)
        # a mean at an end of the choices leaves only equal means, which no grid holds
        found = dict(solve(couplings)) or dict(solve((1.0,)))
        if not found:
            raise BudgetError(f"no coupling of content and quality layers meets a mean of {bits:g} {operand} bits")
        plans = {
            coupling: {n: w._replace(**{operand: chosen.get(n, getattr(w, operand))}) for n, w in widths.items()}
            for coupling, chosen in found.items()
        }
        kept[operand], widths = _least(plans, true_error)
    return widths, kept


def _least(
    plans: Mapping[float, dict[str, Width]], true_error: Callable[[Mapping[str, Width]], float]
) -> tuple[float, dict[str, Width]]:
    """The plan with the least true error, the first of equals; equal plans are measured once."""
    known: dict[tuple, float] = {}

    def measured(coupling: float) -> float:
        key = tuple(sorted(plans[coupling].items()))
        if key not in known:
            known[key] = true_error(plans[coupling])
        return known[key]

    best = min(plans, key=measured)
    return best, plans[best]
