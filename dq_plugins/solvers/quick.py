"""Solvers ``greedy`` and ``threshold``: quick choices without proof, to start from and to compare with.

Shapes: ``N`` choice sets, ``K`` columns, ``C`` budgets.
"""

from __future__ import annotations

import time

import numpy as np

from dq_plugins.solvers.answer import answer
from dq_plugins.solvers.program import Choice, ChoiceProgram, Floats
from dq_plugins.solvers.solution import Solution


def greedy(program: ChoiceProgram, *, hint: Choice | None = None) -> Solution:
    """Start at the cheapest widths and always buy the change that saves the most error per budget used.

    Args:
        program: the program.
        hint: not used.

    Returns:
        A solution without proof: its bound is that of the linear relaxation.
    """
    began = time.perf_counter()
    return answer(program, greedy_choice(program), "greedy", began)


def threshold(program: ChoiceProgram, *, hint: Choice | None = None) -> Solution:
    """One error threshold for all layers, as low as the budgets allow.

    Source: the recipe of Apple's mixed-bit palettization (ml-stable-diffusion), which compares each layer's own signal
    to noise ratio with one number.

    Args:
        program: the program.
        hint: not used.

    Returns:
        A solution without proof: its bound is that of the linear relaxation.
    """
    began = time.perf_counter()
    return answer(program, threshold_choice(program), "threshold", began)


def _shares(program: ChoiceProgram) -> Floats:
    """What every column costs, ``[K]``: the sum over budgets, each in fractions of its room above the least cost."""
    total = np.zeros(len(program.error))
    for budget in program.budgets:
        cheapest = program.cheapest(budget.cost)
        room = budget.limit - budget.used(cheapest)
        total += (budget.cost - budget.cost[cheapest][program.set_of]) / (room if room > 0 else 1.0)
    return total


def greedy_choice(program: ChoiceProgram) -> Choice | None:
    """The choice of `greedy`, ``[N]``, or None when the cheapest widths exceed a budget."""
    choice = program.cheapest(_shares(program))
    costs = np.stack([b.cost for b in program.budgets]) if program.budgets else np.zeros((0, len(program.error)))
    while program.feasible(choice):
        room = np.array([b.limit - b.used(choice) for b in program.budgets])  # [C]
        saved = program.error[choice][program.set_of] - program.error  # [K]
        extra = costs - costs[:, choice][:, program.set_of]  # [C, K]
        fits = (saved > 0) & (extra <= room[:, None]).all(0)
        if not fits.any():
            return choice
        # what a change uses of what is left; changes that cost nothing come first
        share = (np.maximum(extra, 0) / np.maximum(room, 1e-300)[:, None]).sum(0)
        rate = np.where(fits, saved / np.maximum(share, 1e-12), -np.inf)
        column, before = int(rate.argmax()), choice
        choice = before.copy()
        choice[program.set_of[column]] = column
        if not program.feasible(choice):  # float64 differences and exact sums disagree in the last digit
            return before
    return None


def start_of(program: ChoiceProgram, hint: Choice | None) -> Choice | None:
    """Where an exact search starts: at the hint if that is feasible, else at the greedy choice, if that is."""
    return hint if hint is not None and program.feasible(hint) else greedy_choice(program)


def threshold_choice(program: ChoiceProgram) -> Choice | None:
    """The choice of `threshold`, ``[N]``, or None when even the loosest threshold exceeds a budget.

    In every choice set it is the cheapest column whose error is not above the threshold, else the most accurate; the
    threshold is found by bisection over all errors.
    """
    shares, levels = _shares(program), np.unique(program.error)

    def at(level: float) -> Choice:
        passes = program.error <= level
        # columns that fail stand behind all that pass, in the order of their errors
        return program.cheapest(np.where(passes, shares, np.inf), ties=program.error)

    low, high = -1, len(levels) - 1
    if not program.feasible(at(levels[high])):
        return None
    while high - low > 1:  # at(levels[high]) is feasible, at(levels[low]) is not
        middle = (low + high) // 2
        low, high = (low, middle) if program.feasible(at(levels[middle])) else (middle, high)
    return at(levels[high])
