"""Fast choices without proof: the baselines, and the first incumbent of the exact solvers.

Shapes: ``N`` menus, ``K`` columns, ``C`` budgets.
"""

from __future__ import annotations

import numpy as np

from dq_plugins.solvers.program import Choice, ChoiceProgram, Floats
from dq_plugins.solvers.relaxation import Relaxation, lagrangian


def _scaled_costs(program: ChoiceProgram) -> tuple[Floats, Floats]:
    """Costs ``[C, K]`` above the least of the menu and room ``[C]``, in fractions of each budget's room."""
    base = np.stack([b.cost - b.cost[program.cheapest(b.cost)][program.menu_of] for b in program.budgets])
    room = np.array([b.limit - b.used(program.cheapest(b.cost)) for b in program.budgets])
    unit = np.where(room > 0, room, 1.0)
    return base / unit[:, None], room / unit


def cheapest_start(program: ChoiceProgram) -> Choice:
    """In every menu the column that costs least, the budgets weighed by their room."""
    if not program.budgets:
        return program.cheapest(program.error)
    costs, _ = _scaled_costs(program)
    return program.cheapest(costs.sum(0) + 1e-12 * program.error / max(float(np.abs(program.error).max()), 1e-300))


def _room(program: ChoiceProgram, choice: Choice) -> Floats:
    return np.array([b.limit - b.used(choice) for b in program.budgets])


def improve(program: ChoiceProgram, choice: Choice) -> Choice:
    """Take the best single change (error saved per budget used) that fits, until none does.

    Args:
        program: the program.
        choice: where to start, ``[N]``; feasible.

    Returns:
        A feasible choice that is no worse.
    """
    costs = np.stack([b.cost for b in program.budgets]) if program.budgets else np.zeros((0, len(program.error)))
    choice, room = choice.copy(), _room(program, choice)
    while True:
        saved = program.error[choice][program.menu_of] - program.error
        extra = costs - costs[:, choice][:, program.menu_of]
        fits = (saved > 0) & (extra <= room[:, None]).all(0)
        if not fits.any():
            return choice
        # what a change uses of what is left; changes that cost nothing come first
        share = (np.maximum(extra, 0) / np.maximum(room, 1e-300)[:, None]).sum(0)
        rate = np.where(fits, saved / np.maximum(share, 1e-12), -np.inf)
        column = int(rate.argmax())
        candidate = choice.copy()
        candidate[program.menu_of[column]] = column
        if not program.feasible(candidate):  # only where float64 differences and exact sums disagree in the last digit
            return choice
        choice, room = candidate, _room(program, candidate)


def round_relaxation(program: ChoiceProgram, relaxation: Relaxation, steps: int = 30) -> Choice | None:
    """A feasible choice near the relaxed optimum: raise the prices until the budgets hold, then `improve`.

    Returns:
        The choice, ``[N]``, or None when no multiple of the prices (nor the cheapest choice) is feasible.
    """

    def at(factor: float) -> Choice:
        return program.cheapest(lagrangian(program, relaxation.prices * factor).reduced + 1e-15 * program.error)

    best = None
    low, high = 0.0, 1.0
    while high < 1e6 and not program.feasible(at(high)):
        low, high = high, high * 2
    if program.feasible(at(high)):
        for _ in range(steps):
            middle = (low + high) / 2
            low, high = (low, middle) if program.feasible(at(middle)) else (middle, high)
        best = at(high)
    else:
        cheapest = cheapest_start(program)
        best = cheapest if program.feasible(cheapest) else None
    return None if best is None else improve(program, best)


def threshold_choice(program: ChoiceProgram) -> Choice | None:
    """One error threshold for all menus: in each the cheapest column whose error is below it, else the most accurate.

    The threshold is the lowest one that the budgets allow, found by bisection over all errors.
    Source: the recipe of Apple's mixed-bit palettization (ml-stable-diffusion), which compares each layer's own signal
    to noise ratio with one number.

    Returns:
        The choice, ``[N]``, or None when even the loosest threshold exceeds a budget.
    """
    costs = _scaled_costs(program)[0].sum(0) if program.budgets else np.zeros(len(program.error))
    accurate = program.cheapest(program.error)
    span = costs.max(initial=1.0) + 1.0

    def at(threshold: float) -> Choice:
        passes = program.error <= threshold
        choice = program.cheapest(np.where(passes, costs, span))
        return np.where(passes[choice], choice, accurate)

    levels = np.unique(program.error)
    if not program.feasible(at(levels[-1])):
        return None
    low, high = -1, len(levels) - 1  # at(levels[high]) is feasible, at(levels[low]) is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if program.feasible(at(levels[middle])) else (middle, high)
    return at(levels[high])
