"""Which layers move the denoiser's output most when they are quantized: a look at all, a measurement of a few.

All layers are compared with themselves in full precision on the inputs that full precision gives them, in one run. Of
those that are wrong by most, relative to what they give, each is then quantized alone, and the denoiser's output
compared. Errors of layers are nearly uncorrelated, so their powers add up to that of the whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dq_plugins.calibration import CalibrationSet, Call
from dq_plugins.hooks import hooked
from dq_plugins.quantized.layer import LayerState
from dq_plugins.quantized.run import QuantizedRun, States
from dq_plugins.sensitivity.exact_noise import noise_and_signal

LOOKED_AT = 2
"""Recorded samples that are looked at."""


def output_error(run: QuantizedRun, quantized: States, calls: Iterable[Call]) -> float:
    """Squared error of the denoiser's output over its power, with these layers quantized; ``run`` is open."""
    run.use(quantized)
    error, power = noise_and_signal(run.denoiser, calls)
    return error / max(power, 1e-300)


def own_errors(run: QuantizedRun, states: States, calls: Iterable[Call]) -> dict[str, float]:
    """Squared error of each layer's output over its power, on the inputs of full precision.

    Args:
        run: open.
        states: of the quantized layers.
        calls: to look at.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    inside: set[str] = set()

    def compare(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if name in inside or not isinstance(output, Tensor):
            return
        inside.add(name)  # what runs here is the layer again
        run.put(name, states[name])
        found = run.modules[name](*args, **kwargs)
        run.put(name, LayerState())
        inside.remove(name)
        sums[name][0] += float((found - output).double().square().sum())
        sums[name][1] += float(output.double().square().sum())

    run.use({})
    with torch.no_grad(), hooked({name: run.modules[name] for name in states}, after=compare):
        for call in calls:
            call.run(run.denoiser)
    return {name: error / max(power, 1e-300) for name, (error, power) in sums.items()}


def harm(run: QuantizedRun, states: States, calibration: CalibrationSet, count: int) -> dict[str, float]:
    """What the worst layers do to the denoiser's output, the worst first: each one's share of the error that those
    before it leave.

    Args:
        run: open.
        states: of the quantized layers.
        calibration: recorded calls.
        count: of layers, at most.
    """
    calls = list(calibration.spread(LOOKED_AT, LOOKED_AT).calls())
    own = own_errors(run, states, calls)
    worst = sorted(own, key=own.__getitem__, reverse=True)[:count]
    alone = {name: output_error(run, {name: states[name]}, calls) for name in worst}
    left, shares = max(output_error(run, states, calls), sum(alone.values()), 1e-300), {}
    for name in sorted(alone, key=alone.__getitem__, reverse=True):
        shares[name] = alone[name] / left
        left = max(left - alone[name], 1e-300)
    return shares
