"""Linear layers that multiply int8 codes.

Shapes: ``x [N, ..., K]``, weight codes ``[O, K]``, result ``[N, ..., O]``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dq_torchao.kernels import int8_linear
from dq_torchao.kernels.product import takes
from dq_torchao.layer import IntegerLayer


class IntegerLinear(IntegerLayer, nn.Linear):
    """Linear layer in integers, with activation parameters from the group table.

    Still an ``nn.Linear``, so that tools which wrap linear layers (LoRA by peft) find it.
    """

    operator = "linear"

    def takes_rows(self, codes: Tensor, dtype: torch.dtype, bias: Tensor | None) -> bool:
        """See `RowRanges.takes_rows`."""
        return codes.device.type == "cpu" and takes(dtype, bias)

    def multiply(
        self,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        wholly: bool = False,
    ) -> Tensor:
        """See `IntegerLayer.multiply`."""
        return int8_linear(codes, scale, zero_point, self.stored_weight, self.weight_scale, bias, dtype)

    def multiply_floats(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """See `IntegerLayer.multiply_floats`."""
        return F.linear(F.linear(x, down), up)

    def with_kept(self, y: Tensor, inside: Tensor, weight: Tensor) -> Tensor:
        """See `IntegerLayer.with_kept`."""
        if y.dtype != inside.dtype:
            return y + F.linear(inside, weight)
        rows, parts = y.reshape(-1, y.shape[-1]), inside.reshape(-1, inside.shape[-1])
        return torch.addmm(rows, parts, weight.T).reshape(y.shape)  # in one pass over the result
