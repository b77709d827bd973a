"""Active calibration: draw a call, learn a little, look where it is still undecided, draw there.

    score(t) = H(t) + eta / (N_t + 1)

H(t) is the entropy of t's groups: high while it is undecided which group t belongs to. N_t counts the calls drawn at t;
the second term bounds what calls not drawn yet could still change. The groups learned on the way only say where to
look; ``timestep-groups`` chooses the ones that count, from what was drawn.

Source: ADP-DM (Wang et al. 2024), structural risk minimisation over timesteps; eta = 1.5 is the paper's. (Its released
code subtracts twice the number of visits instead.)

Shapes: ``T`` timesteps, ``L`` layers, ``N`` values, ``G`` groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from dq_plugins.calibration import CalibrationSet
from dq_plugins.observers.streaming import stream_inputs
from dq_plugins.passes.ranges.search.points import POINTS, PointsLoss, representative
from dq_plugins.passes.ranges.search.relaxation import Relaxation, entropy, spread, start_logits
from dq_plugins.quantized.statistics import Collector
from dq_plugins.timesteps import RowOrder

STEPS = 5  # of the optimiser after each drawn call
LOGIT_RATE, RANGE_RATE = 0.2, 0.002  # its learning rates


def expected_gain(entropy: Tensor, visits: Tensor, eta: float) -> Tensor:
    """The score of each timestep ``[T]``, in nats, from the entropy of its groups and the calls drawn there ``[T]``."""
    return entropy + eta / (visits + 1)


def next_timestep(gain: Tensor, available: Tensor) -> int | None:
    """Index of the largest gain ``[T]`` among timesteps with calls ``available`` ``[T]``; the first of equals."""
    open_gain = torch.where(available > 0, gain, torch.full_like(gain, -torch.inf))
    best = int(open_gain.argmax())
    return best if bool(open_gain[best] > -torch.inf) else None


class ActiveCalibration:
    """Draws recorded calls where the groups are least decided.

    Args:
        denoiser: full-precision denoiser.
        calibration: the pool: recorded calls, of which some are drawn.
        bits: width of each layer's input.
        groups: G.
        symmetric: whether zero points are 0.
        rows: where the samples of a call are in the inputs of layers.
        eta: weight of what is unseen.
        entropy_weight: of the entropy in the search beside the drawing; the loss is divided by the error of one static
            range.
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
        generator: torch.Generator,
        rows: Mapping[str, RowOrder | None] = MappingProxyType({}),
        eta: float = 1.5,
        entropy_weight: float = 0.8,
    ) -> None:
        self.denoiser, self.calibration, self.bits = denoiser, calibration, dict(bits)
        self.rows = rows
        self.groups, self.symmetric, self.eta, self.entropy_weight = groups, symmetric, eta, entropy_weight
        steps = len(calibration.timesteps)
        self.visits = torch.zeros(steps, dtype=torch.int64)
        self.entropy = torch.full((steps,), groups, dtype=torch.float32).log()
        self._pool = torch.tensor([calibration.count(t) for t in calibration.timesteps])
        self._collector = Collector()
        self._values = torch.zeros(len(self.bits), steps, POINTS)
        self._weights = torch.zeros_like(self._values)
        self._generator = generator

    def draw(self, threshold: float, limit: int) -> Iterator[tuple[int, float]]:
        """Draw calls until the expected gain falls under ``threshold``, ``limit`` calls are drawn, or none is left.

        Every timestep is drawn once before any is drawn again: nothing is as uncertain as one not seen.

        Yields:
            Index of the timestep of the call drawn, and its expected gain before, in nats.
        """
        learning = False
        while int(self.visits.sum()) < limit:
            gain = expected_gain(self.entropy, self.visits, self.eta)
            index = next_timestep(gain, self._pool - self.visits)
            if index is None or float(gain[index]) < threshold:
                return
            self._observe(index)
            self.visits[index] += 1
            if learning:
                self._learn(index)
            elif bool((self.visits > 0).all()):
                learning = True
                self._begin()
                for i in range(len(self.visits)):
                    self._learn(i)
            yield index, float(gain[index])

    def _observe(self, index: int) -> None:
        """Run the next call at a timestep and add the layers' inputs to its statistics."""
        t = self.calibration.timesteps[index]
        call = self.calibration.call(t, int(self.visits[index]))
        chosen = self.calibration.subset([t], calls=[call.index])
        for _ in stream_inputs(self.denoiser, chosen, list(self.bits), self._collector.see, rows=self.rows):
            pass
        found = self._collector.at(t)
        for i, name in enumerate(self.bits):
            self._values[i, index], self._weights[i, index] = representative(*found[name].histogram.points())

    def _begin(self) -> None:
        """Start learning: from even logits, and ranges spread over the timesteps; the loss of one static range is 1."""
        seen = torch.where(self._weights > 0, self._values, 0.0)  # ranges contain 0 anyway
        low, high = seen.amin(-1), seen.amax(-1)
        logits = start_logits((1, len(self.visits), self.groups), None, self._generator)
        self._relaxation = Relaxation(logits, *spread(low, high, self.groups))
        everything = self._loss(slice(None), None)
        self._power = everything.power
        static = Relaxation(torch.zeros(1, 1, 1), low.amin(1, keepdim=True), high.amax(1, keepdim=True))
        with torch.no_grad():
            self._scale = max(float(everything.loss(0, torch.ones(1, len(self.visits), 1), static)), 1e-30)
        self._optimiser = torch.optim.Adam(
            [
                {"params": list(self._relaxation.rows), "lr": LOGIT_RATE},
                {"params": [self._relaxation.log_ends], "lr": RANGE_RATE},
            ]
        )

    @torch.enable_grad()
    def _learn(self, index: int) -> None:
        """A few steps on one timestep, and the entropy of its groups after them."""
        loss = self._loss(slice(index, index + 1), self._power)
        for _ in range(STEPS):
            shares = self._relaxation.weights(1.0, [index])
            error = loss.loss(0, shares, self._relaxation) / self._scale
            self._optimiser.zero_grad()
            (error + self.entropy_weight * entropy(shares).mean()).backward()
            self._optimiser.step()
        self.entropy[index] = entropy(self._relaxation.weights(1.0, [index]).detach())[0, 0]

    def _loss(self, steps: slice, power: Tensor | None) -> PointsLoss:
        bits = list(self.bits.values())
        return PointsLoss(self._values[:, steps], self._weights[:, steps], bits, symmetric=self.symmetric, power=power)
