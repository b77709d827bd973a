"""Steps of a sampler that nobody knows, read off a recording.

Samplers whose next sample is linear in the current one and in the denoiser's output (DDIM, DDPM, Euler, rectified flow,
any prediction type, with classifier-free guidance in one batch or without) satisfy

    x_{k+1} = a_k x_k + b_k y_k + r_k                (guided: b_k y_k + c_k y'_k, for the two halves of the batch)

with ``r_k`` the noise a stochastic sampler adds. ``a_k``, ``b_k``, ``c_k`` are found by least squares over all recorded
runs, and ``r_k`` is what remains. With them a run can be repeated with a quantized denoiser from the recording alone
(same seeds, same noise; in full precision it gives the recorded samples), and a gradient can be carried back through
it.

Shapes: ``B`` images; ``C`` channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dq_plugins.calibration import CalibrationSet, Call


@dataclass(frozen=True)
class Update:
    """One step of the sampler: ``x' = sample * x + sum_i outputs[i] * y_i``; one output, or two when guided."""

    sample: float
    outputs: tuple[float, ...]


def fit_updates(
    calibration: CalibrationSet, runs: list[list[int]], argument: str, guided: bool, ends: Sequence[Tensor | None]
) -> tuple[tuple[Update, ...], float]:
    """Least squares for every step over all runs, by normal equations in float64."""
    steps = len(runs[0]) - (ends[0] is None)
    if steps == 0:
        return (Update(0.0, (1.0, 0.0) if guided else (1.0,)),), 0.0
    terms = 3 if guided else 2
    gram = torch.zeros(steps, terms, terms, dtype=torch.float64)  # [steps, terms, terms]
    target = torch.zeros(steps, terms, dtype=torch.float64)  # [steps, terms]
    power = moved = 0.0
    for run, end in zip(runs, ends, strict=True):
        for step, (columns, following) in enumerate(_pairs(calibration, run, argument, guided, end)):
            gram[step] += columns @ columns.T
            target[step] += columns @ following
            power += float(following.square().sum())
            moved += float((following - columns[0]).square().sum())
    found = torch.linalg.pinv(gram, hermitian=True) @ target[..., None]  # [steps, terms, 1]: a, b (and c)
    explained = float((found.mT @ target[..., None]).sum())
    updates = tuple(Update(float(f[0]), tuple(float(v) for v in f[1:])) for f in found.squeeze(-1))
    return updates, max(power - explained, 0.0) / max(moved, 1e-300)


def _pairs(
    calibration: CalibrationSet, run: list[int], argument: str, guided: bool, end: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Regressors ``[terms, n]`` and next sample ``[n]`` of every step of a run."""

    def regressors(call: Call) -> Tensor:
        sample = call.kwargs[argument].double()
        output = call.output.double()[:, : sample.shape[1]]  # without channels of a learned variance
        images = len(sample) // (2 if guided else 1)
        return torch.stack([c.reshape(-1) for c in (sample[:images], *output.split(images))])

    before: Call | None = None
    for index in run:
        (call,) = calibration.subset(calls=[index]).calls()
        if before is not None:
            columns = regressors(before)
            yield columns, call.kwargs[argument].double().reshape(-1)[: columns.shape[1]]
        before = call
    if before is not None and end is not None:
        yield regressors(before), end.double().reshape(-1)
