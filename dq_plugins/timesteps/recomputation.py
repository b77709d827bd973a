"""Activation checkpointing: what is computed again in backward belongs to the call that it was first computed in.

``torch.utils.checkpoint`` runs a part of the denoiser a second time while gradients are computed: after the denoiser's
forward returned, maybe after other calls of it, and on an accelerator in a thread of the autograd engine. What tells
the calls apart then are the tensors that were saved for backward. While a call runs that may be differentiated, each
is saved together with the call's selection; the inputs of a checkpointed part are unpacked right before the part runs
again, in the thread where it runs, whichever of the two kinds of checkpointing it is.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dq_plugins.timesteps.selection import Selection

MODIFIED = (
    "a tensor that is needed for computing a gradient was modified by an in-place operation after it was saved: it is "
    "at version {now}, expected version {saved}"
)


class Running(threading.local):
    """The selections of one context in one thread; every thread has its own.

    Attributes:
        selection: of the call of the denoiser that runs.
        unpacked: of the call whose saved tensors the running backward unpacked last.
    """

    def __init__(self) -> None:
        # Attributes of the instance, not of the class: a compiler that traces a call guards on their being there.
        self.selection: Selection | None = None
        self.unpacked: Selection | None = None

    @property
    def recomputed(self) -> Selection | None:
        """The selection of what is being computed again; None where no backward is running."""
        # Within a graph that is compiled this cannot be asked; only a part that is compiled on its own gets here.
        inside = torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1
        return self.unpacked if inside else None


def remember(running: Running, selection: Selection) -> saved_tensors_hooks | None:
    """Hooks that save the selection with every tensor saved for backward; None where PyTorch allows no hooks."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():
        return None  # transformations of torch.func allow no hooks, and no checkpointing
    # PyTorch calls the innermost hooks only: those of others (activation offloading) are called from ours.
    pack, unpack = torch._C._autograd._top_saved_tensors_default_hooks(False) or (_pack, _unpack)

    def unpack_and_note(packed: Any) -> Tensor:
        saved = unpack(packed)
        running.unpacked = selection
        return saved

    return saved_tensors_hooks(pack, unpack_and_note)


def _pack(saved: Tensor) -> tuple[Tensor, int]:
    return saved.detach(), saved._version  # not the tensor itself: it would hold the graph that holds it


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    saved, version = packed
    if saved._version != version:  # with hooks this check is not PyTorch's
        raise RuntimeError(MODIFIED.format(now=saved._version, saved=version))
    return saved
