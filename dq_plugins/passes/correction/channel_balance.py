"""Pass ``channel-balance``: even out the input channels of each layer, as strongly as lowers its error.

A quantizer of activations has one range for all channels of a layer's input, so a few loud channels cost all others
their resolution. Dividing them by factors, and multiplying the weights that meet them, changes nothing in full
precision and moves the difficulty to the weights, which have a scale for each output.

Layers that share an input share the factors, so that it is divided once. Layers that depend on the timestep alone are
left as they are: their inputs can be told apart by timestep.

Source: Xiao et al. 2023 (SmoothQuant); how strongly is searched for, see `dq_plugins.passes.correction.strength`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dq_plugins.hooks import hooked
from dq_plugins.layer_kinds import kind_of
from dq_plugins.observers.grouping import uniform_groups
from dq_plugins.observers.streaming import first_argument
from dq_plugins.passes.correction.mean_error import output_means
from dq_plugins.passes.correction.strength import InputSample, balance_factors, exact_outputs, remaining_error
from dq_plugins.passes.shared_inputs import layers_by_input
from dq_plugins.plan import QuantPlan
from dq_plugins.quantized.input_rows import input_rows, seen_and_held_out, weight_matrix
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress


class ChannelBalance(Pass):
    """Scale loud input channels down and their weights up, where it lowers the error."""

    name = "channel-balance"
    after = ("calibration-timesteps",)

    class Options(PassOptions):
        """Options of ``channel-balance``.

        Attributes:
            calls: recorded calls to learn from, spread evenly over the recording. A `bias-correction` with as many
                calls and samples is spared their run in full precision.
            samples: of these calls together; half of each call gives the ranges, and the other is judged on.
            rows: rows of a layer's input that count, for each call.
            strengths: what is tried beside none.
            quietest: what is tried as the least magnitude of a channel, see `balance_factors`.
            groups: timestep groups with ranges of their own, by which strengths are compared.
            least_gain: share of its error that a layer must lose, or it stays as it is: a balance costs one
                multiplication of the input.
        """

        calls: int = Field(24, ge=1)
        samples: int = Field(48, ge=1)
        rows: int = Field(12, ge=1)
        strengths: tuple[float, ...] = Field((0.25, 0.5, 0.75), min_length=1)
        quietest: tuple[float, ...] = Field((0.02, 0.2), min_length=1)
        groups: int = Field(8, ge=1)
        least_gain: float = Field(0.05, ge=0, lt=1)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Sample the inputs in one sweep, then try the strengths layer by layer."""
        if context.targets.act_bits is None:
            return  # weights alone have a scale for each output; nothing is shared by channels
        sharing = layers_by_input(context)
        calls = context.calibration.spread(self.options.calls, self.options.samples)
        gathering = _Gathering(context.denoiser, {names[0] for names in sharing}, self.options.rows)
        means = output_means(context, calls)
        for done, call in enumerate(calls.calls()):
            yield Progress(done, len(calls) + len(sharing), "inputs")
            with means.watching(call):
                gathering.see(call, context.generator("rows", str(call.index)))
        for done, names in enumerate(sharing):
            yield Progress(len(calls) + done, len(calls) + len(sharing), names[0])
            balance = self._best(gathering.sample(names[0]), names, context)
            for name in names:
                plan.layers[name].balance = balance

    def _best(self, sample: InputSample, names: Sequence[str], context: PassContext) -> Tensor | None:
        layers: list[Any] = [context.denoiser.get_submodule(name) for name in names]
        weights = [weight_matrix(layer, layer.weight.float()) for layer in layers]  # [P, O/P, K] each
        magnitude = torch.stack([channel_magnitude(layer) for layer in layers]).amax(0)  # [C]
        inputs = torch.maximum(-sample.low, sample.high).amax(0)
        timesteps = list(range(len(sample.low)))
        groups = uniform_groups([float(t) for t in timesteps], self.options.groups)
        exact = exact_outputs(sample, weights)

        def error(balance: Tensor) -> float:
            return remaining_error(
                sample,
                weights,
                exact,
                balance,
                act_bits=context.targets.act_bits,
                weight_bits=context.targets.weight_bits,
                groups=groups.index(torch.tensor(timesteps)),
                symmetric=context.targets.symmetric_acts,
            )

        settings = itertools.product(self.options.strengths, self.options.quietest)
        candidates = [balance_factors(inputs, magnitude, strength, least) for strength, least in settings]
        errors = [error(balance) for balance in candidates]
        best = min(range(len(errors)), key=errors.__getitem__)
        plain = error(torch.ones_like(inputs))
        return candidates[best] if errors[best] < (1 - self.options.least_gain) * plain else None


class _Gathering:
    """Samples of the inputs of some layers, over calls.

    Args:
        denoiser: full precision.
        names: layers.
        rows: of each call.
    """

    def __init__(self, denoiser: nn.Module, names: set[str], rows: int) -> None:
        self.denoiser, self.count = denoiser, rows
        self.modules = {name: denoiser.get_submodule(name) for name in sorted(names)}
        self._timesteps: list[float] = []
        self._low: dict[str, list[Tensor]] = {name: [] for name in self.modules}
        self._high: dict[str, list[Tensor]] = {name: [] for name in self.modules}
        self._rows: dict[str, list[Tensor]] = {name: [] for name in self.modules}
        self._of_call: dict[str, list[int]] = {name: [] for name in self.modules}

    def see(self, call: Any, generator: torch.Generator) -> None:
        """Run a call and keep a part of what the layers see."""
        self._timesteps.append(float(call.timestep.float().mean()))

        def observe(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layer, x = self.modules[name], first_argument(name, args, kwargs)
            kind = kind_of(layer)
            assert kind is not None
            seen, held_out = seen_and_held_out(x, batched=x.dim() > 1 + kind.spatial)
            channels = seen.float().movedim(kind.channel_axis, -1).flatten(0, -2)  # [positions, C]
            self._low[name].append(channels.amin(0))
            self._high[name].append(channels.amax(0))
            self._rows[name].append(input_rows(layer, held_out, self.count, generator))  # [P, R, K]
            self._of_call[name] += [len(self._timesteps) - 1] * self._rows[name][-1].shape[1]

        with hooked(self.modules, before=observe, first=True):
            call.run(self.denoiser)

    def sample(self, name: str) -> InputSample:
        """What was seen of a layer's input; calls in the order of their timesteps."""
        order = torch.tensor(self._timesteps).argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        uses = len(self._low[name]) // len(order)  # of the layer in one call
        low, high = (torch.stack(v).unflatten(0, (len(order), uses)) for v in (self._low[name], self._high[name]))
        return InputSample(
            low.amin(1)[order],
            high.amax(1)[order],
            torch.cat(self._rows[name], 1),
            place[torch.tensor(self._of_call[name])],
        )


def channel_magnitude(layer: nn.Module) -> Tensor:
    """Largest magnitude of the weights that meet each input channel, ``[C]``."""
    weight: Any = layer.weight
    largest = weight.detach().float().abs().flatten(2).amax(2) if weight.dim() > 2 else weight.detach().float().abs()
    groups = getattr(layer, "groups", 1)
    return largest.reshape(groups, -1, largest.shape[1]).amax(1).flatten()  # [P, O/P, C/P] -> [C]
