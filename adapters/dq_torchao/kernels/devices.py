"""Which kernels a device runs, and what they hold of a weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dq_torchao.kernels import cuda, onednn
from dq_torchao.kernels.operators import Kernel
from dq_torchao.kernels.packing import PackedWeights, unpack_codes

_SUMS = PackedWeights()


def kernel_for(operator: str, device: torch.device) -> Kernel:
    """The kernel that runs ``operator`` on ``device``.

    Args:
        operator: ``"linear"`` or ``"conv2d"``.
        device: where the layer's weight lies.
    """
    if device.type == "cpu":
        return onednn.kernel(operator)
    if device.type == "cuda":
        return cuda.kernel(operator)
    return Kernel("", "", f"there is no integer kernel for device type {device.type!r}")


def prepacked_bytes(weight: Tensor) -> int:
    """Bytes that the kernels hold of a packed weight beside its packed form: 0 before the first call."""
    if weight.device.type not in ("cpu", "cuda"):
        return 0
    return (onednn if weight.device.type == "cpu" else cuda).prepacked_bytes(weight)


def plain_codes(
    weight: Tensor,
    shape: Sequence[int],
    bits: int,
    signs: bool,
    zero_point: Tensor | None,
    group_scale: Tensor | None,
) -> Tensor:
    """Codes of `unpack_codes`; also of a weight that was released."""
    make = onednn.plain_codes if weight.device.type == "cpu" else unpack_codes
    return make(weight, shape, bits, signs, zero_point, group_scale)


def release(weight: Tensor) -> Tensor | None:
    """An empty tensor that stands for a packed weight from now on, or None where it has to stay."""
    if weight.device.type != "cpu":
        return None
    return onednn.release(weight)


@torch.library.impl("dq_torchao::weight_code_sum", ("CPU", "CUDA"))
def _weight_code_sum(
    weight: Tensor,
    shape: list[int],
    bits: int,
    signs: bool,
    weight_zero_point: Tensor | None,
    weight_group_scale: Tensor | None,
) -> Tensor:
    """``sum_k w[o, k]`` of the codes that kernels multiply: int32 ``[O]``."""
    stored = (weight, shape, bits, signs, weight_zero_point, weight_group_scale)
    # cloned: an operator may not hand out one tensor twice
    return _SUMS.get(weight, "sum", lambda: plain_codes(*stored).flatten(1).sum(1, dtype=torch.int32)).clone()
