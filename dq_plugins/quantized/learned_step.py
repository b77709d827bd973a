"""Learned step size quantizer (LSQ), for activations at 2 to 8 bits and the 8-bit weights of the edge layers.

Source: Esser et al., "Learned Step Size Quantization" (ICLR 2020), sections 2.1 and 2.2.

    q  = clip(round(x / s), -2^(b-1), 2^(b-1) - 1),   x^ = s q
    s0 = 2 mean |x| / sqrt(Q_P),   gradient of s scaled by 1 / sqrt(numel Q_P)

The value is `dq_plugins.affine.fake_quantize`, bit for bit. ``Q_P`` is the largest code. ``numel`` counts the
elements one step serves: all of ``x`` for an activation, one output channel for a weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.affine import integer_range, per_row
from dq_plugins.quantized.straight_through import fake_quantize_ste

SMALLEST_STEP = 1e-8


def scale_gradient_factor(step: Tensor, numel: int, bits: int) -> Tensor:
    """``step`` itself, bit for bit, with its gradient multiplied by ``1 / sqrt(numel Q_P)``."""
    return step.detach() + (step - step.detach()) / math.sqrt(numel * integer_range(bits)[1])


def learned_step_quantize(x: Tensor, step: Tensor, bits: int, numel: int) -> Tensor:
    """LSQ: quantize and dequantize with LSQ's gradients for ``x`` and ``step``.

    Args:
        x: any shape; computed in float32, returned in ``x.dtype``.
        step: broadcasts against ``x``; its magnitude is the step size.
        bits: width of the code.
        numel: elements that one step serves.
    """
    s = scale_gradient_factor(step.abs().clamp_min(SMALLEST_STEP), numel, bits)
    return fake_quantize_ste(x, s, 0, *integer_range(bits))


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of ``value`` over the processes of a distributed run, so that all of them start equal."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value


class _LearnedStep(nn.Module):
    dq_quantizer_state = True
    bits: int
    step: nn.Parameter

    def scale(self) -> Tensor:
        """The step as an affine scale: positive float32, the step's shape."""
        return self.step.detach().float().abs().clamp_min(SMALLEST_STEP)


class LearnedStepActivation(_LearnedStep):
    """Activation quantizer with one learned step, set by the first batch it sees.

    Args:
        bits: width of the code.
        device: where the step lives.

    Attributes:
        step: the learned step, a scalar parameter; the magnitude counts.
        started: whether the first batch has set it; saved with the checkpoint.
    """

    started: Tensor

    def __init__(self, bits: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.bits = bits
        self.step = nn.Parameter(torch.ones((), device=device))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool, device=device))
        self._running = False  # what `started` says, without asking the device at every call

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Set the step from one batch (in a distributed run: from the batches of all processes)."""
        magnitude = mean_over_processes(x.detach().float().abs().mean())
        self.step.copy_(2 * magnitude / math.sqrt(integer_range(self.bits)[1]))
        self.started.fill_(True)
        self._running = True

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x``."""
        if not self._running:
            self.start(x)
        return learned_step_quantize(x, self.step, self.bits, x.numel())

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._running = not self.started.is_meta and bool(self.started)


class LearnedStepWeight(_LearnedStep):
    """8-bit weight quantizer with one learned step per output channel, started at the channel's range.

    LSQ's own start, ``2 mean |w| / sqrt(Q_P)``, spends 8 bits on 16 standard deviations; the range of the weight
    is known, so the step starts at ``max |w| / Q_P``.

    Args:
        weight: ``[O, ...]``.
    """

    bits = 8

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        largest = weight.detach().abs().flatten(1).amax(1)  # [O]
        self.step = nn.Parameter((largest / integer_range(self.bits)[1]).clamp_min(SMALLEST_STEP))

    def forward(self, weight: Tensor) -> Tensor:
        """Quantize and dequantize ``weight``."""
        return learned_step_quantize(weight, per_row(self.step, weight), self.bits, weight[0].numel())
