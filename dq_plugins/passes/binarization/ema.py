"""Exponential moving average of the trained parameters, as diffusion models are sampled with."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def moving_average(model: nn.Module, decay: float = 0.999) -> AveragedModel:
    """An averaged copy of a model, with the usual warm-up of the decay.

        average <- d average + (1 - d) parameter        d = min(decay, (1 + n) / (10 + n)) at update n = 2, 3, ...

    The first ``update_parameters(model)`` copies, and early averages forget the start. Buffers are those of the model
    at the latest update.

    Args:
        model: whose parameters are averaged.
        decay: largest decay.
    """

    def update(averages: list[Tensor], parameters: list[Tensor], updates: Tensor) -> None:
        step = int(updates) + 1
        get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))(averages, parameters, updates)

    return AveragedModel(model, multi_avg_fn=update)
