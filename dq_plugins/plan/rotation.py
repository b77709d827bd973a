"""What a plan says about the rotation of a layer's input channels.

Shapes: ``C`` input channels, ``b`` channels of a block, ``B`` = C / b blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dq_plugins.artifact import STRICT, StoredTensor
from dq_plugins.errors import PlanError
from dq_plugins.plan.brief import brief

RotationKind = Literal["hadamard", "regular-hadamard", "matrix"]


@dataclass
class Rotation:
    """An orthogonal transform of input channels, block by block: ``x' = x R``.

    Attributes:
        kind: ``"hadamard"``: R is Sylvester's Hadamard matrix over the root of b, the same for every block;
            ``"regular-hadamard"``: a Hadamard matrix whose rows all have the same sum, so that no channel gathers what
            the others have in common; ``"matrix"``: R is stored.
        block: b, which divides C: a power of two, for regular matrices of four.
        matrix: float64 ``[B, b, b]``, of kind ``"matrix"``.
    """

    __pydantic_config__ = STRICT
    __repr__ = brief

    kind: RotationKind
    block: int
    matrix: StoredTensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("hadamard", "regular-hadamard", "matrix"):
            raise PlanError(f"a rotation is 'hadamard', 'regular-hadamard' or 'matrix', got {self.kind!r}")
        if (self.kind == "matrix") != (self.matrix is not None):
            raise PlanError("a rotation of kind 'matrix' has a matrix, the others have none")
        if self.matrix is None:
            base = 2 if self.kind == "hadamard" else 4
            if not is_power(self.block, base):
                raise PlanError(f"a {self.kind} rotation has blocks of a power of {base} channels, got {self.block!r}")
            return
        shape = tuple(self.matrix.shape)
        if self.block < 2 or len(shape) != 3 or shape[1:] != (self.block, self.block):
            raise PlanError(f"a rotation of blocks of {self.block} has matrices [blocks, {self.block}, {self.block}], "
                            f"got {shape}")  # fmt: skip
        if self.matrix.dtype != torch.float64:
            raise PlanError(f"the matrices of a rotation are float64, got {self.matrix.dtype}")


def is_power(number: int, base: int) -> bool:
    """Whether a number is the first, second, ... power of ``base``.

    Example:
        >>> [n for n in range(70) if is_power(n, 4)]
        [4, 16, 64]
    """
    power = base
    while power < number:
        power *= base
    return power == number
