"""Weight binarizers that train: one basis, and the evolvable pair of bases.

Source: Zheng et al., "BinaryDM: Accurate Weight Binarization for Efficient Diffusion Models" (ICLR 2025), section 3.

    one basis    w_b   = s1 sign(w)                                s1 = mean |w|
    two bases    w_EBB = s1 sign(w) + s2 sign(w - s1 sign(w))      s2 = mean |w - s1 sign(w)|   (initial values)

The text initialises ``s1`` with an l2 norm over n; only the l1 norm, the mean magnitude, minimises
``|w - s1 sign(w)|``, and the authors' code takes that one too.

For Gaussian weights the relative squared errors are known: ``1 - 2/pi = 0.363`` with one basis, 0.1305 with two at
these initial values (the best four-level quantizer, Max 1960, has 0.1175).

Shapes: weight ``[O, ...]``, scales ``[O]``, one per output channel.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dq_plugins.affine import per_row
from dq_plugins.errors import DQError
from dq_plugins.quantized.straight_through import sign, sign_ste

ScaleGradient = Literal["autograd", "printed"]


def mean_magnitude(weight: Tensor) -> Tensor:
    """Mean of ``|w|`` over each output channel: ``[O]``."""
    if weight.dim() < 2:
        raise DQError(
            f"a binarizer has one scale per output channel of a weight [O, ...]; got shape {tuple(weight.shape)}"
        )
    return weight.detach().abs().flatten(1).mean(1)


class BinaryBasis(nn.Module):
    """Vanilla binarizer: ``s1 sign(w)`` with a learned scale per output channel.

    Args:
        weight: ``[O, ...]``, sets the initial scale.
        clip: magnitude beyond which the gradient to the weight stops.
    """

    dq_quantizer_state = True
    bits = 1

    def __init__(self, weight: Tensor, clip: float = 1.0) -> None:
        super().__init__()
        self.clip = clip
        self.scale = nn.Parameter(mean_magnitude(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Binarized weight, the shape of ``weight``."""
        return per_row(self.scale, weight) * sign_ste(weight, self.clip)

    @property
    def evolved(self) -> bool:
        """Whether there is no second basis, or none any more."""
        return True


class EvolvableBasis(BinaryBasis):
    """Evolvable-basis binarizer: two bases while it learns, one after `evolve`.

    The stage is a buffer that multiplies the second scale: 1, then 0, or what `fade` puts between the two. Nothing
    branches on it, so a compiled graph stays valid over the transition, a checkpoint carries the stage, and the second
    scale keeps a (zero) gradient, which distributed training expects of every parameter. After the transition the
    forward is ``s1 sign(w)`` bit for bit.

    Two gradients for ``s1`` are offered, because the printed one and the one that follows from the printed forward
    differ (b1 and b2 are the two signs; both hold where ``|w - s1 b1| < 1``, elsewhere both are ``b1``):

        autograd   b1 (1 - s2)        straight-through b2, by the chain rule
        printed    b1 (1 - s2 b1)  =  b1 - s2

    The printed form shifts the gradient of a whole channel by ``-s2 sum(dL/dw)``, which is not part of the
    derivative: see ``docs/binarydm.md`` for the comparison with finite differences. Hence the default.

    Args:
        weight: ``[O, ...]``, sets the initial scales.
        clip: magnitude beyond which the gradients to the weight and to the residual stop.
        scale_gradient: ``"autograd"`` or ``"printed"``.
    """

    stage_one: Tensor

    def __init__(self, weight: Tensor, clip: float = 1.0, scale_gradient: ScaleGradient = "autograd") -> None:
        super().__init__(weight, clip)
        if scale_gradient not in ("autograd", "printed"):
            raise DQError(f"scale_gradient is 'autograd' or 'printed', got {scale_gradient!r}")
        self.scale_gradient = scale_gradient
        self.second_scale = nn.Parameter(mean_magnitude(weight - per_row(self.scale.detach(), weight) * sign(weight)))
        self.register_buffer("stage_one", torch.ones_like(self.second_scale[0]).detach())

    def forward(self, weight: Tensor) -> Tensor:
        """Binarized weight, the shape of ``weight``."""
        first = per_row(self.scale, weight)  # [O, 1, ...], as second
        second = per_row(self.second_scale * self.stage_one, weight)
        basis = sign_ste(weight, self.clip)  # b1, [O, ...]
        if self.scale_gradient == "autograd":
            return first * basis + second * sign_ste(weight - first * basis, self.clip)
        residual = weight - first.detach() * basis
        inside = (residual.abs() < self.clip).to(weight.dtype)
        printed = (first - first.detach()) * (second * inside).detach()  # value 0, gradient s2 for s1
        return first * basis + second * sign_ste(residual, self.clip) - printed

    @property
    def evolved(self) -> bool:
        """Whether the second basis has been dropped."""
        return not bool(self.stage_one)


def evolvable_bases(model: nn.Module) -> list[EvolvableBasis]:
    """Every evolvable-basis binarizer inside ``model``, each once."""
    return [module for module in model.modules() if isinstance(module, EvolvableBasis)]


def fade(model: nn.Module, share: float) -> int:
    """Let second bases that are not dropped yet count for a share of themselves, 1 (all) to 0 (dropped for good).

    Returns:
        How many there were.
    """
    bases = [basis for basis in evolvable_bases(model) if not basis.evolved]
    for basis in bases:
        basis.stage_one.fill_(share)
    return len(bases)


def evolve(model: nn.Module) -> int:
    """Make the transition to one basis everywhere in ``model``; returns how many binarizers made it."""
    return fade(model, 0.0)


@torch.no_grad()
def shrink(model: nn.Module, left: int) -> None:
    """The regulariser as a step of its own, after the optimizer's: it takes the ``left``-th part of every second scale.

        s2 <- s2 (1 - 1/left)        left: iterations until the second bases are dropped, this one included

    Adam divides a gradient by its own size, and that of `evolution_penalty` is small beside the loss's: at the paper's
    factor a second scale then shrinks by a small part of the learning rate an iteration, or not at all where the loss
    wants it larger. Decoupled, as AdamW decouples weight decay, the factor follows from the length: second scales go
    down linearly from where they are, and what the optimizer adds on the way has to go down as well. At the end no more
    is left than one step of the optimizer.

    Args:
        model: holds `EvolvableBasis` modules anywhere.
        left: at least 1.
    """
    for basis in evolvable_bases(model):
        basis.second_scale.mul_(1 - 1 / left)


def evolution_penalty(model: nn.Module, tau: float = 9e-2) -> Tensor:
    """Regulariser that shrinks the second bases before they are dropped.

        L_EBB = tau (1/N) sum_i mean |s2_i|        i over the N layers that have a second basis

    The paper prints ``s2`` without the magnitude; a learned scale that crosses zero would then be rewarded for
    growing again with the other sign. After the transition the value and the gradients are zero, and every second
    scale is still part of the graph.

    Args:
        model: holds `EvolvableBasis` modules anywhere.
        tau: weight of the regulariser.

    Raises:
        DQError: there is no evolvable basis in ``model``.
    """
    bases = evolvable_bases(model)
    if not bases:
        raise DQError(f"this {type(model).__name__} has no evolvable-basis binarizer, so there is nothing to penalise")
    return tau * torch.stack([(b.second_scale * b.stage_one).abs().mean() for b in bases]).mean()


def second_scale_mean(model: nn.Module) -> float:
    """Mean over layers of ``mean |s2|``: what the regulariser shrinks. Zero without evolvable bases."""
    bases = evolvable_bases(model)
    return float(torch.stack([b.second_scale.detach().abs().mean() for b in bases]).mean()) if bases else 0.0
