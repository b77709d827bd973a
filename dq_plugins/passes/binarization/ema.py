"""Exponential moving average of the trained parameters, as diffusion models are sampled with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """``average <- decay average + (1 - decay) parameter``, with the usual warm-up of the decay.

    Args:
        model: whose parameters are averaged.
        decay: largest decay. At step n it is ``min(decay, (1 + n) / (10 + n))``: early averages forget the start.

    Attributes:
        average: by parameter name.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        self.decay, self.steps = decay, 0
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's parameters."""
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        parameters = dict(model.named_parameters())
        averages = list(self.average.values())
        torch._foreach_lerp_(averages, [parameters[name].detach() for name in self.average], weight)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with the averaged parameters, until the ``with`` block ends."""
        parameters = dict(model.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in self.average}
        self._write(parameters, self.average)
        try:
            yield
        finally:
            self._write(parameters, kept)

    @staticmethod
    @torch.no_grad()
    def _write(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            parameters[name].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, and the number of updates under ``"steps"``."""
        return {**self.average, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take averages over, for example from a checkpoint."""
        self.steps = int(state["steps"])
        self._write(self.average, {name: value for name, value in state.items() if name != "steps"})
