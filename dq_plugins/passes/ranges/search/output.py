"""Loss of the search on outputs: of the whole denoiser, of its blocks, or of single layers.

A copy of the denoiser with the planned weights runs recorded calls; the inputs of its layers pass through the mixture.
Its outputs are compared with those of the full-precision denoiser. For blocks and layers the full-precision denoiser
gives inputs and targets in one run, and each unit starts from its full-precision inputs.

Shapes: ``T`` timesteps, ``G`` groups, ``Q`` sets of groups (1 or L), ``L`` layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.calibration import CalibrationSet
from dq_plugins.calibration.call import Call, first_tensor
from dq_plugins.hooks import Arguments, hooked
from dq_plugins.passes.ranges.search.mixture import mixture
from dq_plugins.passes.ranges.search.relaxation import Relaxation
from dq_plugins.plan import QuantPlan
from dq_plugins.quantized.student import planned_student

Quantize = Callable[[Tensor], Tensor]


def student_of(denoiser: nn.Module, plan: QuantPlan) -> nn.Module:
    """A frozen copy of the denoiser that computes with the plan's weights; activations stay in full precision."""
    return planned_student(denoiser, plan).eval().requires_grad_(False)


class OutputLoss:
    """Squared error of outputs relative to their power over all timesteps, mean over units.

    Args:
        denoiser: full-precision denoiser.
        student: a copy with the planned weights.
        calibration: recorded calls.
        bits: width of each layer's input, in the order of the relaxation's layers.
        units: names of the modules whose outputs are compared; ``("",)`` is the denoiser itself.
        symmetric: whether zero points are 0.
        order: timesteps that iterations see, by index, one after the other: rounds of all of them. Wraps around.
        images: samples of a call that an iteration runs; they take turns.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        student: nn.Module,
        calibration: CalibrationSet,
        bits: Mapping[str, int],
        *,
        units: Sequence[str] = ("",),
        symmetric: bool,
        order: Sequence[int],
        images: int = 2,
    ) -> None:
        self.denoiser, self.student, self.calibration = denoiser, student, calibration
        self.bits, self.units, self.symmetric = dict(bits), tuple(units), symmetric
        self.order, self.images = tuple(order), images
        self.power = self._power()
        self.elements = calibration.call(calibration.timesteps[0], 0).output[0].numel()

    @property
    def per_round(self) -> int:
        """An iteration sees one timestep."""
        return len(self.calibration.timesteps)

    def timesteps(self, iteration: int) -> list[int]:
        """The one timestep that an iteration sees."""
        return [self.order[iteration % len(self.order)]]

    def loss(self, iteration: int, weights: Tensor, relaxation: Relaxation) -> Tensor:
        """Relative error at this iteration's timestep; ``weights`` is ``[Q, 1, G]``."""
        (index,) = self.timesteps(iteration)
        call = self.visited(index, iteration // self.per_round)
        low, high = relaxation.ranges()
        shared = weights.shape[0] == 1

        def quantizer(position: int, width: int) -> Quantize:
            w = weights[0 if shared else position, 0]
            return lambda x: mixture(x, w, low[position], high[position], width, symmetric=self.symmetric)

        return self._error(call, {n: quantizer(i, b) for i, (n, b) in enumerate(self.bits.items())})

    def visited(self, index: int, turn: int) -> Call:
        """What one visit of a timestep runs: a part of its recorded calls, each turn other images."""
        t = self.calibration.timesteps[index]
        call = self.calibration.call(t, turn % self.calibration.count(t))
        batch = len(call.output)
        start = (turn // self.calibration.count(t)) * self.images
        rows = sorted({(start + i) % batch for i in range(min(self.images, batch))})
        return call.rows(torch.tensor(rows), batch)

    def _error(self, call: Call, quantizers: Mapping[str, Quantize]) -> Tensor:
        """Mean over units of squared error over power."""
        if self.units == ("",):
            with _quantized(self.student, quantizers):
                return (call.run(self.student) - call.output).square().mean() / self.power[""]
        errors = []
        with _captured(self.denoiser, self.units) as seen, torch.no_grad():
            call.run(self.denoiser)
        with _quantized(self.student, quantizers):
            for unit, (args, kwargs, target) in seen.items():
                output = first_tensor(self.student.get_submodule(unit)(*args, **kwargs))
                errors.append((output - target).square().mean() / self.power[unit])
        return torch.stack(errors).mean()

    @torch.no_grad()
    def _power(self) -> dict[str, float]:
        """Mean square of each unit's full-precision output, over one call of each timestep."""
        total = dict.fromkeys(self.units, 0.0)
        for index in range(len(self.calibration.timesteps)):
            call = self.visited(index, 0)
            if self.units == ("",):
                total[""] += float(call.output.square().mean())
                continue
            with _captured(self.denoiser, self.units) as seen:
                call.run(self.denoiser)
            for unit, (_, _, target) in seen.items():
                total[unit] += float(target.square().mean())
        return {unit: max(value / len(self.calibration.timesteps), 1e-30) for unit, value in total.items()}


@contextmanager
def _quantized(student: nn.Module, quantizers: Mapping[str, Quantize]) -> Iterator[None]:
    """Layers of the student quantize their first argument."""

    def quantize(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        return (quantizers[name](args[0]), *args[1:]), kwargs

    with hooked({n: student.get_submodule(n) for n in quantizers}, before=quantize):
        yield


@contextmanager
def _captured(
    denoiser: nn.Module, units: Sequence[str]
) -> Iterator[dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]]]:
    """Arguments and output of modules, of their last call."""
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}

    def keep(unit: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen[unit] = (args, kwargs, first_tensor(output))

    with hooked({u: denoiser.get_submodule(u) for u in units}, after=keep):
        yield seen
