"""A layer's input in two parts: the directions that stay in floating point, and the rest, which is quantized.

    a = x B^T,   x_ = x - a B                        r orthonormal directions B; a fp16 B is off by a thousandth
    w_ = w - w B^T B,   m = w B^T (2 - B B^T)        f(x_, w_) + f(a, m) = f(x, w) for any B

The largest principal directions of an input hold most of its energy, so what is left is small and its ranges are
narrow: rounding errs less, and so does the rounding of the weight that meets the rest. Source: Saxena et al. 2024
(ResQ, arXiv 2412.14363), which keeps them in 8 bits.

Shapes: ``C`` channels, ``r`` directions, ``O`` outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dq_plugins.errors import PlanError
from dq_plugins.plan.subspace import Subspace
from dq_plugins.quantized.exact_state import ExactState


class Split(ExactState):
    """Splits channels; sums are of the dtype of what comes in, float32 at least.

    Args:
        subspace: what the plan says.
        device: where it lives.

    Attributes:
        basis: float16 ``[r, C]``.
    """

    exact_state = ("basis",)

    basis: Tensor

    def __init__(self, subspace: Subspace, device: torch.device | None = None) -> None:
        super().__init__()
        self.register_buffer("basis", subspace.basis.to(device, copy=True))

    def forward(self, x: Tensor, axis: int = -1) -> tuple[Tensor, Tensor]:
        """``a [..., r, ...]`` and ``x_``, of the shape of ``x``.

        Raises:
            PlanError: so many channels are not what it splits.
        """
        x, axis = self._checked(x, axis)
        if axis < x.dim() - 1 and _channels_last(x, axis):
            return tuple(part.movedim(-1, axis) for part in self(x.movedim(axis, -1)))  # type: ignore[return-value]
        inside, basis = self.inside(x, axis), self.basis.to(x)
        if axis == x.dim() - 1:
            rows = x.reshape(-1, x.shape[-1])
            return inside, torch.addmm(rows, inside.reshape(len(rows), -1), basis, alpha=-1).reshape(x.shape)
        rows = _rows(x, axis)
        spread = basis.T.expand(len(rows), -1, -1)  # [R, C, r]
        return inside, torch.baddbmm(rows, spread, _rows(inside, axis), alpha=-1).reshape(x.shape)

    def inside(self, x: Tensor, axis: int = -1) -> Tensor:
        """``a``."""
        x, axis = self._checked(x, axis)
        basis = self.basis.to(x)
        if axis == x.dim() - 1:
            return x @ basis.T
        if _channels_last(x, axis):
            return self.inside(x.movedim(axis, -1)).movedim(-1, axis)
        return (basis @ _rows(x, axis)).reshape(*x.shape[:axis], len(basis), *x.shape[axis + 1 :])

    def _checked(self, x: Tensor, axis: int) -> tuple[Tensor, int]:
        if x.shape[axis] != self.basis.shape[1]:
            raise PlanError(
                f"a subspace of {self.basis.shape[1]} channels does not fit the {x.shape[axis]} of this layer"
            )
        return x.to(torch.promote_types(x.dtype, torch.float32)), axis % x.dim()

    def outside(self, x: Tensor, axis: int = -1) -> Tensor:
        """``x_``; of a weight along its input channels, ``w_``."""
        return self(x, axis)[1]

    def kept(self, weight: Tensor) -> Tensor:
        """m of a weight ``[O, C, ...]``: ``[O, r, ...]``."""
        inside, _ = self(weight, 1)
        basis = self.basis.to(inside)
        return (inside.movedim(1, -1) @ (2 * torch.eye(len(basis)).to(inside) - basis @ basis.T)).movedim(-1, 1)

    def spread(self, kept: Tensor) -> Tensor:
        """m as a weight for the input as it comes, ``[O, C, ...]``."""
        return (kept.movedim(1, -1) @ self.basis.to(kept)).movedim(-1, 1)

    @property
    def planned(self) -> Subspace:
        """As a plan says it."""
        return Subspace(self.basis.cpu())

    def extra_repr(self) -> str:
        """Directions and channels."""
        return f"{len(self.basis)} of {self.basis.shape[1]} channels"


def _channels_last(x: Tensor, axis: int) -> bool:
    """Whether channels lie beside each other in memory. A compiler lays values out for what follows, as it likes."""
    return torch.compiler.is_compiling() or (x.movedim(axis, -1).is_contiguous() and not x.is_contiguous())


def _rows(x: Tensor, axis: int) -> Tensor:
    """``[R, C, n]``: to move the channels to the end takes longer than to multiply them."""
    return x.reshape(math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :]))
