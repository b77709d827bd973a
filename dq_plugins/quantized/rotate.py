"""Orthogonal transforms of the input channels of a layer, block by block.

    x'[g b + j] = sum_i x[g b + i] R[g, i, j]                 R[g] R[g]^T = 1

Weights that are rotated alike meet the rotated input with the same result. A rotation spreads what is large in one
channel over a block of them, so that one range serves all.

Sources: Ashkboos et al. 2024 (QuaRot), Hadamard matrices; Feng et al. 2025 (ConvRot), regular ones in groups.

Shapes: ``C`` channels, ``b`` of a block, ``B`` blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq_plugins.errors import PlanError
from dq_plugins.plan.rotation import Rotation
from dq_plugins.quantized.exact_state import ExactState

REGULAR = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))
SYLVESTER = ((1, 1), (1, -1))


def hadamard_matrix(order: int, *, regular: bool = False) -> Tensor:
    """Symmetric matrix of signs with orthogonal rows, float64 ``[order, order]``; regular: all rows have one sum.

    Args:
        order: a power of two; regular: of four.
        regular: see above.

    Example:
        >>> hadamard_matrix(16, regular=True).sum(1).unique()
        tensor([4.], dtype=torch.float64)
    """
    factor = torch.tensor(REGULAR if regular else SYLVESTER, dtype=torch.float64)
    matrix = factor
    while len(matrix) < order:
        matrix = torch.kron(matrix, factor)
    return matrix


class Rotate(ExactState):
    """Rotates channels, and back.

    A Hadamard matrix is held as signs: they are exact in every dtype, and so is the rotation then.

    Args:
        rotation: what the plan says.
        device: where it lives.

    Attributes:
        matrix: ``[1, b, b]`` or ``[B, b, b]``; not saved where it is a Hadamard matrix.
        size: what it is multiplied by.
    """

    exact_state = ("matrix",)

    matrix: Tensor

    def __init__(self, rotation: Rotation, device: torch.device | None = None) -> None:
        super().__init__()
        self.kind, self.block = rotation.kind, rotation.block
        matrix, self.size = rotation.matrix, 1.0
        if matrix is None:
            matrix = hadamard_matrix(rotation.block, regular=rotation.kind == "regular-hadamard")[None]
            self.size = rotation.block**-0.5
        dtype = torch.float32 if rotation.matrix is None else torch.float64
        self.register_buffer("matrix", matrix.to(device, dtype, copy=True), persistent=rotation.matrix is not None)

    def forward(self, x: Tensor, axis: int = -1, inverse: bool = False) -> Tensor:
        """Rotate, at least in float32.

        Args:
            x: channels along ``axis``.
            axis: their axis.
            inverse: rotate back.

        Raises:
            PlanError: so many channels are not what it rotates.
        """
        blocks, rest = divmod(x.shape[axis], self.block)
        if rest or len(self.matrix) not in (1, blocks):
            raise PlanError(
                f"a rotation of {len(self.matrix) * self.block} channels does not fit the {x.shape[axis]} of this layer"
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        matrix = self.matrix.to(x.device, dtype)
        matrix = matrix.transpose(1, 2) if inverse else matrix
        parts = x.to(dtype).movedim(axis, -1).unflatten(-1, (blocks, self.block))  # [..., B, b]
        shared = len(matrix) == 1
        rotated = (parts @ matrix[0] if shared else (parts[..., None, :] @ matrix)[..., 0, :]).flatten(-2)
        return (rotated if self.size == 1 else rotated * self.size).movedim(-1, axis)

    @property
    def planned(self) -> Rotation:
        """As a plan says it."""
        return Rotation(self.kind, self.block, self.matrix.cpu() if self.kind == "matrix" else None)

    def extra_repr(self) -> str:
        """Kind and block."""
        return f"{self.kind}, block={self.block}"
