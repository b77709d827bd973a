"""What a plan says about directions of a layer's input that stay in floating point.

Shapes: ``C`` input channels, ``r`` directions, ``O`` outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dq_plugins.artifact import STRICT, StoredTensor
from dq_plugins.errors import PlanError
from dq_plugins.plan.brief import brief
from dq_plugins.plan.validity import finite_fault


@dataclass
class Subspace:
    """Directions of the input channels that are neither quantized nor meet a quantized weight.

    Attributes:
        basis: float16 ``[r, C]``, orthonormal rows, the most important one first. What is left without them is
            small only if they are orthonormal; the layer's result in full precision is the same for any.
    """

    __pydantic_config__ = STRICT
    __repr__ = brief

    basis: StoredTensor

    def __post_init__(self) -> None:
        basis = self.basis
        if basis.dim() != 2 or not 0 < len(basis) < basis.shape[1] or basis.dtype != torch.float16:
            raise PlanError(
                f"a subspace has a float16 basis [directions, channels], fewer directions than channels, got "
                f"{basis.dtype} of shape {tuple(basis.shape)}"
            )
        if fault := finite_fault(basis.float()):
            raise PlanError(f"the basis of a subspace {fault}")

    @property
    def rank(self) -> int:
        """r."""
        return len(self.basis)

    def nbytes(self, weight: torch.Tensor) -> int:
        """Bytes of the basis, and of the part of a layer's ``weight [O, C, ...]`` that meets it, in float16."""
        return self.basis.nbytes + 2 * self.rank * weight[:, 0].numel()

    def truncated(self, rank: int) -> Subspace:
        """The same with the first ``rank`` directions alone."""
        return Subspace(self.basis[:rank].clone())
