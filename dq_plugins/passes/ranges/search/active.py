"""Active calibration: draw a call, learn a little, look where it is still undecided, draw there.

The groups learned on the way only say where to look; ``timestep-groups`` chooses the ones that count, from what was
drawn.

Source: ADP-DM (He et al. 2024).

Shapes: ``T`` timesteps, ``L`` layers, ``N`` values, ``G`` groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dq_plugins.calibration import CalibrationSet
from dq_plugins.observers.streaming import stream_inputs
from dq_plugins.passes.ranges.search.points import POINTS, PointsLoss, representative
from dq_plugins.passes.ranges.search.relaxation import Relaxation, entropy, start_logits
from dq_plugins.passes.ranges.search.risk import expected_gain, next_timestep
from dq_plugins.passes.ranges.search.start import spread
from dq_plugins.quantized.statistics import Collector


@dataclass(frozen=True)
class ActiveSettings:
    """How the drawing goes.

    Attributes:
        eta: weight of what is unseen (1.5 is the paper's).
        entropy: weight of the entropy in the search that goes on beside the drawing; the loss is divided by the error
            of one static range.
        steps: optimiser steps after each drawn call.
        learning_rate: of the logits.
        range_learning_rate: of the logarithms of the clip bounds.
    """

    eta: float = 1.5
    entropy: float = 0.8
    steps: int = 5
    learning_rate: float = 0.2
    range_learning_rate: float = 0.002


@dataclass(frozen=True)
class Visit:
    """One call that was drawn.

    Attributes:
        timestep: its index.
        gain: expected gain before it was drawn, in nats.
    """

    timestep: int
    gain: float


class ActiveCalibration:
    """Draws recorded calls where the groups are least decided.

    Args:
        denoiser: full-precision denoiser.
        calibration: the pool: recorded calls, of which some are drawn.
        bits: width of each layer's input.
        groups: G.
        symmetric: whether zero points are 0.
        settings: the rest.
        generator: random numbers.

    Attributes:
        visits: calls drawn at each timestep ``[T]``.
        entropy: of each timestep's groups ``[T]``; at a timestep not drawn yet that of an even choice.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        calibration: CalibrationSet,
        bits: Mapping[str, int],
        *,
        groups: int,
        symmetric: bool,
        settings: ActiveSettings,
        generator: torch.Generator,
    ) -> None:
        self.denoiser, self.calibration, self.bits = denoiser, calibration, dict(bits)
        self.groups, self.symmetric, self.settings = groups, symmetric, settings
        steps = len(calibration.timesteps)
        self.visits = torch.zeros(steps, dtype=torch.int64)
        self.entropy = torch.full((steps,), groups, dtype=torch.float32).log()
        self._pool = torch.tensor([calibration.count(t) for t in calibration.timesteps])
        self._collector = Collector()
        self._values = torch.zeros(len(self.bits), steps, POINTS)
        self._weights = torch.zeros_like(self._values)
        self._generator = generator
        self._search: _Search | None = None

    def draw(self, threshold: float, limit: int) -> Iterator[Visit]:
        """Draw calls until the expected gain falls under ``threshold``, ``limit`` calls are drawn, or none is left.

        Every timestep is drawn once before any is drawn again: nothing is as uncertain as one not seen.
        """
        while int(self.visits.sum()) < limit:
            gain = expected_gain(self.entropy, self.visits, self.settings.eta)
            index = next_timestep(gain, self._pool - self.visits)
            if index is None or float(gain[index]) < threshold:
                return
            self._observe(index)
            self.visits[index] += 1
            if self._search is not None:
                self.entropy[index] = self._search.learn(index, self._values, self._weights)
            elif bool((self.visits > 0).all()):
                self._search = _Search(self._values, self._weights, list(self.bits.values()), self)
                for i in range(len(self.visits)):
                    self.entropy[i] = self._search.learn(i, self._values, self._weights)
            yield Visit(index, float(gain[index]))

    def start_logits(self) -> Tensor:
        """Even logits with a little noise ``[1, T, G]``."""
        shape = (1, len(self.visits), self.groups)
        return start_logits(shape, None, lead=0.0, noise=0.01, generator=self._generator)

    def _observe(self, index: int) -> None:
        """Run the next call at a timestep and add the layers' inputs to its statistics."""
        t = self.calibration.timesteps[index]
        call = self.calibration.call(t, int(self.visits[index]))
        chosen = self.calibration.subset([t], calls=[call.index])
        for _ in stream_inputs(self.denoiser, chosen, list(self.bits), self._collector.see):
            pass
        found = self._collector.at(t)
        for i, name in enumerate(self.bits):
            self._values[i, index], self._weights[i, index] = representative(*found[name].histogram.points())


class _Search:
    """The relaxation that goes on learning while calls are drawn, one timestep at a time."""

    def __init__(self, values: Tensor, weights: Tensor, bits: list[int], owner: ActiveCalibration) -> None:
        self.bits, self.symmetric, self.settings = bits, owner.symmetric, owner.settings
        seen = torch.where(weights > 0, values, torch.zeros_like(values))  # ranges contain 0 anyway
        low, high = seen.amin(-1), seen.amax(-1)
        self.relaxation = Relaxation(owner.start_logits(), *spread(low, high, owner.groups))
        whole = Relaxation(torch.zeros(1, 1, 1), low.amin(1, keepdim=True), high.amax(1, keepdim=True))
        everything = PointsLoss(values, weights, bits, symmetric=self.symmetric)
        self.power = everything.power
        with torch.no_grad():
            self.scale = max(float(everything.loss(0, torch.ones(1, values.shape[1], 1), whole)), 1e-30)
        self.optimiser = torch.optim.Adam(
            [
                {"params": list(self.relaxation.rows), "lr": self.settings.learning_rate},
                {"params": [self.relaxation.log_ends], "lr": self.settings.range_learning_rate},
            ]
        )

    @torch.enable_grad()
    def learn(self, index: int, values: Tensor, weights: Tensor) -> Tensor:
        """A few steps on one timestep; returns the entropy of its groups."""
        here = slice(index, index + 1)
        loss = PointsLoss(values[:, here], weights[:, here], self.bits, symmetric=self.symmetric, power=self.power)
        for _ in range(self.settings.steps):
            shares = self.relaxation.weights(1.0, [index])
            error = loss.loss(0, shares, self.relaxation) / self.scale
            self.optimiser.zero_grad()
            (error + self.settings.entropy * entropy(shares).mean()).backward()
            self.optimiser.step()
        with torch.no_grad():
            return entropy(self.relaxation.weights(1.0, [index]))[0, 0]
