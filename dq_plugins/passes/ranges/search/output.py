"""Loss of the search on outputs: of the whole denoiser, of its blocks, or of single layers.

The denoiser runs recorded calls with the planned weights, and the inputs of its layers pass through the mixture. Its
outputs are compared with those of full precision. For blocks and layers the full-precision denoiser
gives inputs and targets in one run, and each unit starts from its full-precision inputs.

Shapes: ``T`` timesteps, ``G`` groups, ``Q`` sets of groups (1 or L), ``L`` layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.calibration import CalibrationSet
from dq_plugins.calibration.call import Call, first_tensor
from dq_plugins.hooks import hooked
from dq_plugins.layer_kinds import LayerKind, kind_of
from dq_plugins.passes.ranges.search.mixture import mixture
from dq_plugins.passes.ranges.search.relaxation import Relaxation
from dq_plugins.plan import QuantPlan
from dq_plugins.quantized.denoiser_loss import Part, divided
from dq_plugins.quantized.layer_transform import LayerTransform, transform_of
from dq_plugins.quantized.run import States, planned_run, planned_states


class _MixedInputs(nn.Module):
    """The mixture of one layer's input: weights and clip bounds ``[G]``, of the input as it is transformed."""

    def __init__(
        self,
        weights: Tensor,
        low: Tensor,
        high: Tensor,
        bits: int,
        symmetric: bool,
        transform: LayerTransform | None,
        kind: LayerKind | None,
    ) -> None:
        super().__init__()
        self.weights, self.low, self.high, self.bits, self.symmetric = weights, low, high, bits, symmetric
        self.transform, self.kind = transform, kind

    def forward(self, x: Tensor) -> Tensor:
        transform, kind = self.transform, self.kind
        values = x if transform is None or kind is None else transform.of_input(kind, x)
        mixed = mixture(values, self.weights, self.low, self.high, self.bits, symmetric=self.symmetric)
        return mixed if transform is None or kind is None else transform.input_restored(kind, mixed)


class OutputLoss:
    """Squared error of outputs relative to their power over all timesteps, mean over units.

    Args:
        denoiser: full-precision denoiser, frozen; it is as it was after each loss.
        plan: with the weights that the searched activations will meet.
        calibration: recorded calls.
        bits: width of each layer's input, in the order of the relaxation's layers.
        units: names of the modules whose outputs are compared; ``("",)`` is the denoiser itself.
        symmetric: whether zero points are 0.
        order: timesteps that iterations see, by index, one after the other: rounds of all of them. Wraps around.
        argument: name of the denoiser's sample argument.
        images: images of a call that an iteration runs; they take turns. Some are held out, and never learned from.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        plan: QuantPlan,
        calibration: CalibrationSet,
        bits: Mapping[str, int],
        *,
        units: Sequence[str] = ("",),
        symmetric: bool,
        order: Sequence[int],
        argument: str,
        images: int = 2,
    ) -> None:
        self.denoiser, self.calibration = denoiser, calibration
        self.bits, self.units, self.symmetric = dict(bits), tuple(units), symmetric
        self.run = planned_run(denoiser, plan, bits)
        self.states = planned_states(self.run, plan, quantize_inputs=False)
        self.transforms = {name: transform_of(plan.layers[name]) for name in bits}
        self.order, self.images = tuple(order), images
        self.parts = [divided(calibration, t, argument) for t in calibration.timesteps]
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
        return self._error(self.visited(index, iteration // self.per_round), self._mixed(weights, relaxation))

    @torch.no_grad()
    def judge(self, weights: Tensor, relaxation: Relaxation) -> float:
        """Mean relative error of images that are never learned from; ``weights`` is ``[Q, T, G]``."""
        errors = []
        for index, (t, (_, judged)) in enumerate(zip(self.calibration.timesteps, self.parts, strict=True)):
            states = self._mixed(weights[:, [index]], relaxation)
            errors += [float(self._error(part.call(self.calibration, t), states)) / len(judged) for part in judged]
        return sum(errors) / len(self.parts)

    def _mixed(self, weights: Tensor, relaxation: Relaxation) -> States:
        """What layers compute with at one timestep, from the weights of its groups ``[Q, 1, G]``."""
        low, high = relaxation.ranges()
        states = dict(self.states)
        for place, (name, bits) in enumerate(self.bits.items()):
            own = weights[place if len(weights) > 1 else 0, 0]  # [G]
            form = (bits, self.symmetric, self.transforms[name], kind_of(self.run.modules[name]))
            mixed = _MixedInputs(own, low[place], high[place], *form)
            states[name] = self.states[name]._replace(quantizer=mixed)
        return states

    def visited(self, index: int, turn: int) -> Call:
        """What one visit of a timestep runs: a part of the calls that are learned from, each turn other images."""
        learned = self.parts[index][0]
        position, images, branches = learned[turn % len(learned)]
        start = (turn // len(learned)) * self.images
        chosen = sorted({images[(start + i) % len(images)] for i in range(min(self.images, len(images)))})
        return Part(position, chosen, branches).call(self.calibration, self.calibration.timesteps[index])

    def _error(self, call: Call, states: States) -> Tensor:
        """Mean over units of squared error over power."""
        if self.units == ("",):
            with self.run:
                self.run.use(states)
                return (call.run(self.denoiser) - call.output).square().mean() / self.power[""]
        errors = []
        with _captured(self.denoiser, self.units) as seen, torch.no_grad():
            call.run(self.denoiser)
        with self.run, self.run.at(call.timestep):
            self.run.use(states)
            for unit, (args, kwargs, target) in seen.items():
                output = first_tensor(self.denoiser.get_submodule(unit)(*args, **kwargs))
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
def _captured(
    denoiser: nn.Module, units: Sequence[str]
) -> Iterator[dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]]]:
    """Arguments and output of modules, of their last call."""
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}

    def keep(unit: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen[unit] = (args, kwargs, first_tensor(output))

    with hooked({u: denoiser.get_submodule(u) for u in units}, after=keep):
        yield seen
