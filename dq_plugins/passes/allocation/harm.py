"""Which layers move the denoiser's output most when they are quantized, found by bisection.

Errors of layers are nearly uncorrelated, so their powers add up: the error of the denoiser's output grows with every
further layer that is quantized, by what that layer does. Where it grows by little over many layers, none of them is
looked at alone. How wrong a layer is by itself would not do: a small error of a skip connection that leads to the
output does more harm than a large one behind which a norm follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heappop, heappush

from dq_plugins.calibration import CalibrationSet, Call
from dq_plugins.quantized.run import QuantizedRun, States
from dq_plugins.sensitivity.exact_noise import noise_and_signal

LOOKED_AT = 2
"""Recorded samples that are looked at."""
LOOKS = 32
"""How often at most; what looks worst comes first."""
HIDING = 0.5
"""Share of the error behind which other layers may not show: without its layers there is another look."""


def output_error(run: QuantizedRun, quantized: States, calls: Iterable[Call]) -> float:
    """Squared error of the denoiser's output over its power, with these layers quantized; ``run`` is open."""
    run.use(quantized)
    error, power = noise_and_signal(run.denoiser, calls)
    return error / max(power, 1e-300)


def harm(run: QuantizedRun, states: States, calibration: CalibrationSet, count: int, least: float) -> dict[str, float]:
    """What the worst layers do to the denoiser's output, the worst first: each one's share of the error that those
    found in earlier rounds leave.

    Args:
        run: open.
        states: of the quantized layers.
        calibration: recorded calls.
        count: of layers, at most.
        least: share that counts.
    """
    calls = list(calibration.spread(LOOKED_AT, LOOKED_AT).calls())
    looks = iter(range(LOOKS))

    def error(names: Sequence[str]) -> float:
        return output_error(run, {name: states[name] for name in names}, calls)

    shares, found = dict[str, float](), {"": 1.0}
    while len(shares) < count and sum(found.values()) >= HIDING:  # behind the worst of all, others do not show
        found = _steps([name for name in states if name not in shares], error, least, looks)
        shares |= found
    return dict(list(shares.items())[:count])


def _steps(
    names: Sequence[str], error: Callable[[Sequence[str]], float], least: float, looks: Iterator[int]
) -> dict[str, float]:
    """Layers with which the error of all so far grows by a share of the whole that counts, and the shares.

    The longest steps are looked into first, as long as there are ``looks``.
    """
    if not names or next(looks, None) is None:
        return {}
    errors = {0: 0.0, len(names): error(names)}
    whole, found, steps = max(errors[len(names)], 1e-300), dict[str, float](), [(-1.0, 0, len(names))]
    while steps:
        share, first, last = heappop(steps)
        if last - first == 1:
            found[names[first]] = -share
            continue
        if next(looks, None) is None:
            break
        middle = (first + last) // 2
        errors[middle] = error(names[:middle])
        for start, end in ((first, middle), (middle, last)):
            share = (errors[end] - errors[start]) / whole
            if share >= least:
                heappush(steps, (-share, start, end))
    return found
