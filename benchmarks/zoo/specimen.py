"""One denoiser of the zoo: how to build it tiny, and the arguments of one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Specimen:
    """One class of the zoo.

    Attributes:
        config: arguments of its constructor.
        inputs: draws the keyword arguments of one call.
        timestep: name of the timestep argument, where it is not a usual one.
        sample: name of the argument through which the noisy sample enters, where its shape does not tell.
        parts: makes modules that the constructor takes first, such as the nets of a multiple one.
        complete: does to a new instance what its pipeline does before it can be called.
        outside: why a stage fails for a cause outside this project, by stage.
    """

    config: Mapping[str, Any]
    inputs: Callable[[], Inputs]
    timestep: str | None = None
    sample: str | None = None
    parts: Callable[[], tuple[Any, ...]] = tuple
    complete: Callable[[Any], Any] = lambda model: model
    outside: Mapping[str, str] = field(default_factory=dict)

    def build(self, cls: type[nn.Module], seed: int = 0) -> nn.Module:
        """An instance with random weights, frozen; parameters that start at zero too, or nothing would pass them."""
        torch.manual_seed(seed)
        model = self.complete(cls(*self.parts(), **self.config)).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.is_floating_point() and not bool(parameter.any()):
                parameter.normal_(std=0.05)
        return model

    def draw(self, seed: int = 0) -> Inputs:
        """The arguments of one call."""
        torch.manual_seed(seed)
        return self.inputs()


def r(*shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ones: a mask, mostly."""
    return torch.ones(shape, dtype=dtype)


def t(batch: int = 2, value: float = 500.0) -> Tensor:
    """One timestep for every sample."""
    return torch.full((batch,), value)


def whole(batch: int = 2, value: int = 500) -> Tensor:
    """The same, of whole numbers."""
    return torch.full((batch,), value)


def indices(*shape: int, below: int = 4) -> Tensor:
    """Whole numbers from 0 on."""
    return torch.randint(0, below, shape)


def grid(count: int, axes: int = 3) -> Tensor:
    """Positions ``[N, axes]`` of a line of tokens."""
    positions = torch.zeros(count, axes)
    positions[:, -1] = torch.arange(count)
    return positions
