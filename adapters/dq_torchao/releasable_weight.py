"""Packed weights that the kernel alone may hold: let go of, and packed again when asked for.

The kernel's layout is not part of the layer, so copies, pickles, state dicts and moves get the packed weight.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from dq_plugins.affine import per_row
from dq_torchao.kernels import StoredWeight, plain_codes, release
from dq_torchao.packed_weight import PackedWeight


class ReleasableWeight(PackedWeight):
    """A packed weight of which the integer kernels hold a form of their own; see `dq_torchao.release_weights`."""

    @property
    def stored_weight(self) -> StoredWeight:
        """The weight as the operators take it."""
        form = (self.weight_shape, self.weight_bits, self.weight_signs)
        return (self.weight_packed, *form, self.weight_zero_point, self.weight_group_scale)

    @property
    def released(self) -> bool:
        """Whether the packed weight is held by the kernel alone; see `dq_torchao.release_weights`."""
        return self.weight_packed.numel() == 0 and prod(self.weight_shape) > 0

    def release_weight(self) -> int:
        """Let go of the packed weight, if the kernel holds it too; returns the bytes that this freed."""
        stand_in = None if self.released else release(self.weight_packed)
        freed = self.weight_packed.nbytes if stand_in is not None else 0
        if stand_in is not None:
            self.weight_packed = stand_in
        return freed

    def restore_weight(self) -> None:
        """Hold the packed weight again."""
        self.weight_packed = self.packed_weight()

    def packed_weight(self) -> Tensor:
        """See `PackedWeight.packed_weight`."""
        if not self.released:
            return self.weight_packed
        codes = plain_codes(*self.stored_weight)
        if self.weight_group_scale is not None:
            codes = codes // per_row(self.weight_group_scale.to(torch.int8), codes)
        if self.weight_zero_point is not None:
            codes = codes + per_row(self.weight_zero_point, codes)
        return self._pack(codes)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight_packed"] = self.packed_weight()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore_weight()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.restore_weight()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which the kernel's layout cannot follow."""
        return self.__dict__ | {"_buffers": self._buffers | {"weight_packed": self.packed_weight()}}
