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
from dq_plugins.plan.validity import scale_fault


@dataclass
class LowRank:
    """Two thin matrices whose product is a part of a weight that is not quantized with it, and nor is its input.

    Attributes:
        down: float16 ``[r, K]``; or int8 codes.
        up: float16 ``[O, r]``; likewise.
        scale: of codes, float32 ``[r]``: the part is ``up diag(scale) down``. None: no codes.
    """

    __pydantic_config__ = STRICT
    __repr__ = brief

    down: StoredTensor
    up: StoredTensor
    scale: StoredTensor | None = None

    def __post_init__(self) -> None:
        shapes = tuple(self.down.shape), tuple(self.up.shape)
        if self.down.dim() != 2 or self.up.dim() != 2 or len(self.down) != self.up.shape[1] or not len(self.down):
            raise PlanError(f"a low-rank branch has matrices [rank, inputs] and [outputs, rank], got {shapes}")
        dtype, form = (torch.float16, "float16") if self.scale is None else (torch.int8, "int8 beside a scale")
        if {self.down.dtype, self.up.dtype} != {dtype}:
            raise PlanError(f"the matrices of a low-rank branch are {form}, got {self.down.dtype} and {self.up.dtype}")
        if not all(bool(torch.isfinite(matrix).all()) for matrix in (self.down, self.up)):
            raise PlanError("a low-rank branch holds NaN or infinity")
        if self.scale is not None and (fault := scale_fault(self.scale, (self.rank,))):
            raise PlanError(f"the scale of a low-rank branch {fault}")

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices, and of the scale."""
        return self.down.nbytes + self.up.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def truncated(self, rank: int) -> LowRank:
        """The same with the first ``rank`` directions alone."""
        scale = None if self.scale is None else self.scale[:rank].clone()
        return LowRank(self.down[:rank].clone(), self.up[:, :rank].clone(), scale)

    def in_8_bits(self) -> LowRank:
        """The same in codes of 8 bits, each direction with a scale of its own in both matrices."""
        down, up = self.down.float(), self.up.float()
        sizes = [down.abs().amax(1), up.abs().amax(0)]  # [r], [r]
        steps = [torch.where(size > 0, size, torch.ones_like(size)) / 127 for size in sizes]
        codes = torch.round(down / steps[0][:, None]).to(torch.int8), torch.round(up / steps[1]).to(torch.int8)
        return LowRank(*codes, steps[0] * steps[1])

    def weight(self, like: Tensor) -> Tensor:
        """Their product, as a part of a weight ``like [O, ...]``, at least float32, on its device.

        Raises:
            PlanError: the weight has other outputs or inputs.
        """
        shape = (len(self.up), self.down.shape[1])
        if like.flatten(1).shape != shape:
            raise PlanError(f"a low-rank branch is for a weight {shape}, and the layer's is {tuple(like.shape)}")
        return thin_product(self.down, self.up, like, self.scale)


def thin_product(down: Tensor, up: Tensor, like: Tensor, scale: Tensor | None = None) -> Tensor:
    """``[r, K]`` and ``[O, r]`` as a weight in the shape ``[O, ...]`` of ``like``, at least float32.

    ``scale`` is that of codes, ``[r]``.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    return (up.to(like.device, dtype) @ scaled_down(down, scale, dtype, like.device)).reshape(like.shape)


def scaled_down(down: Tensor, scale: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[r, K]`` in a floating dtype, times the scale of codes."""
    if scale is None:
        return down.to(device, dtype)
    return (down.to(device, scale.dtype) * scale.to(device)[:, None]).to(dtype)
