"""Choice programs for tests: random small ones, and one that looks like a network."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from dq_plugins.solvers import Budget, ChoiceProgram


@st.composite
def small_programs(
    draw: st.DrawFn, max_choice_sets: int = 5, max_options: int = 4, max_budgets: int = 3
) -> ChoiceProgram:
    """Integer costs and dyadic errors, so that every comparison is exact."""
    sizes = draw(st.lists(st.integers(1, max_options), min_size=1, max_size=max_choice_sets))
    columns = sum(sizes)
    numbers = st.lists(st.integers(0, 60), min_size=columns, max_size=columns)
    error = np.array(draw(numbers), dtype=np.float64) / 8
    budgets = []
    for index in range(draw(st.integers(0, max_budgets))):
        cost = np.array(draw(numbers), dtype=np.float64)
        budgets.append(Budget(f"budget{index}", cost, float(draw(st.integers(0, int(cost.sum()) or 1)))))
    return ChoiceProgram(tuple(f"m{i}" for i in range(len(sizes))), np.cumsum([0, *sizes]), error, tuple(budgets))


def network_program(layers: int = 60, seed: int = 0, room: float = 0.3) -> ChoiceProgram:
    """Widths 2..16, noise that falls as 4^-bits, and budgets of bits, BitOps and (non-integer) latency."""
    rng = np.random.default_rng(seed)
    bits = np.array([2, 3, 4, 6, 8, 16])
    params = np.exp(rng.normal(11, 1.5, layers)).round()
    macs = (params * np.exp(rng.normal(4, 1.5, layers))).round()
    error = np.exp(rng.normal(0, 2, layers))[:, None] * 4.0**-bits * np.exp(rng.normal(0, 0.2, (layers, 6)))
    latency = macs[:, None] * (1 + np.maximum(bits, 4) / 8) * 1e-9 * np.exp(rng.normal(0, 0.1, (layers, 6)))
    tables = {"bits": params[:, None] * bits, "bitops": macs[:, None] * bits * 8, "latency": latency}
    limits = {k: float(t.min(1).sum() + room * (t.max(1).sum() - t.min(1).sum()) / 2) for k, t in tables.items()}
    return ChoiceProgram(
        tuple(f"layer{i}" for i in range(layers)),
        np.arange(layers + 1) * 6,
        error.ravel(),
        tuple(Budget(k, t.ravel(), limits[k]) for k, t in tables.items()),
    )
