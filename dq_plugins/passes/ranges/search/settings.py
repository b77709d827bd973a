"""Settings of the differentiable group search, and its schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EntropyScale = Literal["static", "signal", "absolute"]


@dataclass(frozen=True)
class SearchSettings:
    """How groups are searched for.

    The objective at an iteration is

        loss / scale  +  entropy * ramp(iteration) * mean over timesteps of  - sum_g w_g ln w_g,

    with weights w = softmax(logits / temperature). An entropy weight says nothing without the scale of the loss
    beside it: ADP-DM's 0.8 belongs to the squared error of the noise summed over an image (``"absolute"``). Against an
    error normalised to around 0.01 the same 0.8 commits before the loss has had an effect.

    Attributes:
        rounds: how often each timestep is visited.
        entropy: weight of the entropy at the end.
        entropy_scale: what the loss is divided by: the error that one static range makes (``"static"``), the power of
            the full-precision signal (``"signal"``), or nothing, the error being summed over each image
            (``"absolute"``, the paper's).
        warmup: share of the iterations in which the loss decides alone; then the entropy's weight rises linearly, and
            is whole after twice this share.
        temperature: of the softmax, at the start and at the end; geometric in between.
        travel: about how far a logit can go in all; the learning rate (of Adam) is this over the rounds, and at most
            ``largest_step``: with few rounds, larger steps follow the noise of single images.
        largest_step: see ``travel``.
        range_travel: likewise for the logarithms of the clip bounds. Ranges that move far before the groups are decided
            widen until they serve timesteps of other groups as well.
        noise: standard deviation of the logits' random start.
        lead: logit by which the start's own group leads its neighbours.
    """

    rounds: int = 200
    entropy: float = 0.8
    entropy_scale: EntropyScale = "static"
    warmup: float = 0.3
    temperature: tuple[float, float] = (1.0, 0.5)
    travel: float = 20.0
    largest_step: float = 0.5
    range_travel: float = 0.6
    noise: float = 0.01
    lead: float = 2.0

    @property
    def learning_rate(self) -> float:
        """Of the logits."""
        return min(self.travel / self.rounds, self.largest_step)

    def temperature_at(self, progress: float) -> float:
        """Temperature of the softmax when this share of the iterations is done."""
        first, last = self.temperature
        return first * (last / first) ** progress

    def entropy_at(self, progress: float) -> float:
        """Weight of the entropy: 0, then rising, then whole."""
        if progress < self.warmup:
            return 0.0
        return self.entropy * min((progress - self.warmup) / max(self.warmup, 1e-9), 1.0)
