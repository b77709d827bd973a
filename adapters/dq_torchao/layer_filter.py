"""Filters for ``quantize_`` that know which denoiser a layer belongs to.

torchao hands a handler one layer at a time, and neither the module that ``quantize_`` was called with nor the layer's
name. Timesteps arrive at the denoiser and plans go by names, so handlers of ours need both. A ``filter_fn`` is given
them: torchao asks it about every module by name, first about the root, whose name is empty, and calls the handler as
soon as the filter has accepted a layer, in the same thread. So a filter notes what it is asked, per thread, and a
handler takes the note of its layer, once. The note of the root is a weak reference, and a layer that the root does not
hold under its name has no note: nothing leaks from one call, thread or model into another.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import suppress

from torch import nn

from dq_plugins.compiled import unwrap
from dq_plugins.errors import DQError


class _Notes(threading.local):
    root: weakref.ref[nn.Module] | None = None
    accepted: str | None = None  # name of the layer that was accepted last


_notes = _Notes()


class LayerFilter:
    """A ``filter_fn`` for ``quantize_``, for configs of ours and of torchao.

    Args:
        selects: whether to quantize a module, given the module and its fully qualified name.

    Example::

        attention = LayerFilter(lambda module, name: "attn" in name and linear_and_conv2d(module, name))
        quantize_(denoiser, TimestepInt8Config(step="prepare"), attention)
    """

    def __init__(self, selects: Callable[[nn.Module, str], bool]) -> None:
        self.selects = selects

    def __call__(self, module: nn.Module, name: str = "") -> bool:
        """Whether ``module`` is selected."""
        accepted = bool(self.selects(module, name))
        if name == "":
            _notes.root = weakref.ref(module)
        _notes.accepted = name if accepted else None
        return accepted


def denoiser_of_layer(layer: nn.Module, config: str, instead: str) -> tuple[nn.Module, str]:
    """The denoiser that the running ``quantize_`` was called with, and the name of ``layer`` in it.

    Args:
        layer: what a handler was given.
        config: name of its config, for the message.
        instead: what to call without ``quantize_``, for the message.

    Raises:
        DQError: ``quantize_`` runs with a filter that is not a `LayerFilter`.
    """
    root, accepted = _notes.root, _notes.accepted
    _notes.accepted = None
    denoiser = root() if root is not None else None
    if denoiser is not None and accepted is not None:
        with suppress(AttributeError):  # no module of this name
            if denoiser.get_submodule(accepted) is layer:
                return unwrap(denoiser), accepted.removeprefix("_orig_mod.")  # compiled by torch.compile(denoiser)
    raise DQError(
        f"{config}: quantize_ ran with a filter that does not say which denoiser a {type(layer).__name__} belongs to; "
        f"torchao's own, which it uses when none is given, does not. Write quantize_(denoiser, {config}(...), "
        "dq_torchao.linear_and_conv2d) with the whole denoiser, or dq_torchao.LayerFilter(your_filter) as the filter. "
        f"Without quantize_: {instead}. To quantize while loading, a library that loads models has a config of its own "
        "for plans: see docs/torchao.md."
    )


linear_and_conv2d = LayerFilter(lambda module, _: type(module) in (nn.Linear, nn.Conv2d))
"""Selects linear layers and 2-d convolutions."""
