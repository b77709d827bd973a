"""Floating-point weights that are derived from packed codes: reading is fine, replacing their data is an error.

Tools that merge something into a weight (LoRA's ``fuse_lora``, weight averaging) read ``layer.weight`` and assign to
its ``data``. A dequantized weight is a new tensor at every access, so the change would be lost without a word, and the
images would be those without the adapter.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from dq_plugins.errors import DQError


class DerivedWeight(Tensor):
    """A tensor like any other, except that its ``data`` cannot be replaced. Results of operations are plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        """The values as a plain tensor."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> NoReturn:
        raise DQError(
            "the weight of a quantized layer is packed, and what is read from it is a copy, so nothing can be merged "
            "into it. Merge (fuse_lora) into the full-precision denoiser and quantize that, or leave the adapter "
            "beside the quantized layers, where it works unmerged."
        )


def derived(weight: Tensor) -> Tensor:
    """``weight``, guarded; in a graph that is being compiled, as it is: nothing is assigned there."""
    return weight if torch.compiler.is_compiling() else weight.as_subclass(DerivedWeight)
