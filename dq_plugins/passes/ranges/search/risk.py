"""Where to calibrate next: structural risk minimisation over timesteps.

    score(t) = H(t) + eta / (N_t + 1)

H(t) is the entropy of t's groups: high while it is undecided which group t belongs to. N_t counts the calibration
images drawn at t; the second term bounds what images not drawn yet could still change.

Source: ADP-DM (He et al. 2024), active timestep selection; eta = 1.5 is the paper's. (Its released code subtracts twice
the number of visits instead.)

Shapes: ``T`` timesteps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expected_gain(entropy: Tensor, visits: Tensor, eta: float) -> Tensor:
    """The score of each timestep ``[T]``, in nats.

    Args:
        entropy: of each timestep's groups ``[T]``.
        visits: images drawn at each timestep ``[T]``.
        eta: weight of what is unseen.
    """
    return entropy + eta / (visits + 1)


def next_timestep(gain: Tensor, available: Tensor) -> int | None:
    """Index of the timestep with the largest gain among those with images left; the first of equals.

    Args:
        gain: ``[T]``.
        available: images left at each timestep ``[T]``.
    """
    open_gain = torch.where(available > 0, gain, torch.full_like(gain, -torch.inf))
    best = int(open_gain.argmax())
    return best if bool(open_gain[best] > -torch.inf) else None
