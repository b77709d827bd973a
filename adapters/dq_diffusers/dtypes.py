"""Dtypes in which a quantized denoiser comes back when none is asked for.

Saved tensors have theirs. What is not saved is made when the denoiser is built (tables of positions, mostly), and its
dtype depends on the default dtype then, and on whether the denoiser was cast later. So both are noted: the dtype of
most weights, under the empty name, as the default dtype while the denoiser is built again, and those of buffers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

OWN = (
    "weight_scale",
    "act_scale",
    "balance",
    "bias_correction",
    "low_rank_down",
    "low_rank_up",
    "low_rank_scale",
    "rotation.matrix",
    "split.basis",
    "kept_weight",
    "input_quantizer.scale",
    "output_correction.values",
    "_edges",
    "_bounds",
)
"""Endings of names of tensors that are the quantizer's, in dtypes of their own."""


def noted_dtypes(model: nn.Module) -> dict[str, str]:
    """The dtypes of ``model``, to be kept with it."""
    main = main_dtype({name: tensor.dtype for name, tensor in model.state_dict().items()})
    return {"": _name(main)} | {name: _name(buffer.dtype) for name, buffer in _unsaved(model)}


def main_dtype(dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """Dtype of most floating-point tensors of a state that are not the quantizer's own."""
    counts = Counter(dtype for name, dtype in dtypes.items() if dtype.is_floating_point and not name.endswith(OWN))
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def cast_unsaved(model: nn.Module, noted: Mapping[str, str], main: torch.dtype) -> None:
    """Give the unsaved buffers of a denoiser that was just built the dtypes they had.

    Args:
        model: the denoiser.
        noted: what `noted_dtypes` gave when it was quantized.
        main: dtype of most of its saved tensors; another than noted where it was cast afterwards, with its buffers.
    """
    for name, buffer in list(_unsaved(model)):
        dtype = noted.get(name, _name(buffer.dtype)) if _name(main) == noted.get("") else _name(main)
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        module.register_buffer(attribute, buffer.to(getattr(torch, dtype)), persistent=False)


def _unsaved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict()
    return ((name, b) for name, b in model.named_buffers() if name not in saved and b.is_floating_point())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
