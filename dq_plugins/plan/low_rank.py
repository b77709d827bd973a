"""What a plan says about the low-rank branch of a layer.

Shapes: ``O`` outputs, ``K`` products per output (input channels times positions of the kernel), ``r`` the rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dq_plugins.artifact import STRICT, StoredTensor
from dq_plugins.errors import PlanError
from dq_plugins.plan.brief import brief


@dataclass
class LowRank:
    """Two thin matrices whose product is a part of a weight that stays in floating point, and so does its input.

    Attributes:
        down: float16 ``[r, K]``.
        up: float16 ``[O, r]``.
    """

    __pydantic_config__ = STRICT
    __repr__ = brief

    down: StoredTensor
    up: StoredTensor

    def __post_init__(self) -> None:
        shapes = tuple(self.down.shape), tuple(self.up.shape)
        if self.down.dim() != 2 or self.up.dim() != 2 or len(self.down) != self.up.shape[1] or not len(self.down):
            raise PlanError(f"a low-rank branch has matrices [rank, inputs] and [outputs, rank], got {shapes}")
        if {self.down.dtype, self.up.dtype} != {torch.float16}:
            raise PlanError(f"the matrices of a low-rank branch are float16, got {self.down.dtype} and {self.up.dtype}")
        if not all(bool(torch.isfinite(matrix).all()) for matrix in (self.down, self.up)):
            raise PlanError("a low-rank branch holds NaN or infinity")

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices."""
        return self.down.nbytes + self.up.nbytes

    def truncated(self, rank: int) -> LowRank:
        """The same with the first ``rank`` directions alone."""
        return LowRank(self.down[:rank].clone(), self.up[:, :rank].clone())

    def weight(self, like: Tensor) -> Tensor:
        """Their product, as a part of a weight ``like [O, ...]``, at least float32, on its device.

        Raises:
            PlanError: the weight has other outputs or inputs.
        """
        shape = (len(self.up), self.down.shape[1])
        if like.flatten(1).shape != shape:
            raise PlanError(f"a low-rank branch is for a weight {shape}, and the layer's is {tuple(like.shape)}")
        return thin_product(self.down, self.up, like)


def thin_product(down: Tensor, up: Tensor, like: Tensor) -> Tensor:
    """``[r, K]`` and ``[O, r]`` as a weight in the shape ``[O, ...]`` of ``like``, at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return (up.to(like.device, dtype) @ down.to(like.device, dtype)).reshape(like.shape)
