"""Who gets a branch, and of what rank: least error within what branches may cost, an exact program.

    minimise    log E + price T,    E = sum_l E_l e_l[o_l] / e_l[none],    T = sum_l t_l[o_l] / t
    subject to  sum_l bytes_l[o_l] <= bytes,    T <= time

e_l is the error of a layer's output, E_l that of the final image which the layer makes without a branch (else e_l), and
t_l an estimate of the time of a branch, over t, that of all layers in full precision: multiplications in floating
point, and one more pass over the input. A price of 0.2 is that a hundredth more time must take away 0.2 hundredths of
the error that is left. Without a price one program gives the least E. log E is concave, so with a price programs with
its slope at the last solution come to rest, where none of them is better; another point may be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dq_plugins import registry
from dq_plugins.graph.partition import LayerInfo
from dq_plugins.passes.rotation.branches import Branch
from dq_plugins.plan import Subspace
from dq_plugins.solvers.program import ChoiceProgram
from dq_plugins.solvers.solution import Solution

PASS = 32
"""Multiplications that take as long as reading and writing a number of the input once more: docs/low-rank.md."""
ROUNDS = 20
"""Programs at most; two to four are usual."""


class Offer(NamedTuple):
    """A branch that a layer may have, or none.

    Attributes:
        error: that it leaves of the layer's output, over its power.
        branch: itself.
        bytes: that it takes.
        time: multiplications that take as long as it does.
    """

    error: float
    branch: Branch | None
    bytes: int = 0
    time: float = 0.0


class Limits(NamedTuple):
    """What all branches may cost together: bytes, and time over that of all layers in full precision."""

    bytes: float | None = None
    time: float | None = None


def bytes_of(branch: Branch, weight: Tensor) -> int:
    """Bytes of a branch beside a weight ``[O, C, ...]``."""
    return branch.nbytes(weight) if isinstance(branch, Subspace) else branch.nbytes


def time_of(branch: Branch, info: LayerInfo) -> float:
    """Multiplications that take about as long as a branch of a layer, in one call of the denoiser."""
    outputs, channels, *kernel = info.weight_shape
    products = channels * math.prod(kernel)
    uses = info.macs / (math.prod(info.output_shape) * products)
    inputs = uses * math.prod(info.input_shape)
    if isinstance(branch, Subspace):  # into r directions and back, then what they meet of the weight
        return branch.rank * (2 * inputs + info.macs / channels) + PASS * inputs
    return branch.rank * (info.macs / outputs + info.macs / products) + PASS * inputs


def shared_out(
    offers: Mapping[str, Sequence[Offer]],
    limits: Limits,
    solver: str,
    *,
    image: Mapping[str, float] | None = None,
    price: float = 0.0,
    macs: float = 1.0,
) -> dict[str, Branch | None]:
    """The branch of every layer, by the program at the top of this file.

    Args:
        offers: of every layer, the first of them no branch.
        limits: what branches may cost.
        solver: a registered one.
        image: E_l; None: e_l of no branch.
        price: of time, see the top of this file.
        macs: t, multiplications of all layers.
    """
    if not offers:
        return {}
    image = {name: each[0].error for name, each in offers.items()} if image is None else image
    errors = {
        name: [image[name] * offer.error / max(each[0].error, 1e-30) for offer in each] for name, each in offers.items()
    }
    times = {name: [offer.time / macs for offer in each] for name, each in offers.items()}
    costs = {
        "bytes": ({name: [float(offer.bytes) for offer in each] for name, each in offers.items()}, limits.bytes),
        "time": (times, limits.time),
    }
    budgets = {name: (cost, limit) for name, (cost, limit) in costs.items() if limit is not None}
    program, slope = ChoiceProgram.of(errors, budgets), 0.0
    objective, seconds = program.error, np.concatenate([np.array(each) for each in times.values()])
    for _ in range(ROUNDS):
        solution: Solution = registry.get("solver", solver)(program, hint=None)
        assert solution.choice is not None  # none at all is within every budget
        before, slope = slope, price * float(objective[solution.choice].sum())
        if abs(slope - before) <= 1e-3 * slope:
            break
        program = replace(program, error=objective + slope * seconds)
    chosen = zip(program.names, solution.choice, program.start[:-1], strict=True)
    return {name: offers[name][int(column - start)].branch for name, column, start in chosen}
