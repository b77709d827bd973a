"""Weights repacked into the layout a kernel wants: made at first use, kept as long as the weight lives.

A packed weight is an opaque oneDNN tensor that can be neither copied nor pickled, so it must not be part of a module.
It is kept here, keyed weakly by the weight's identity, and made again when the weight is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class PackedWeights:
    """Cache of packed weights.

    Example:
        >>> import torch
        >>> cache, weight = PackedWeights(), torch.ones(3)
        >>> cache.get(weight, "layout", lambda: "packed") is cache.get(weight, "layout", lambda: "again")
        True
    """

    def __init__(self) -> None:
        self._packed: Any = WeakTensorKeyDictionary()

    def get(self, weight: Tensor, layout: Hashable, pack: Callable[[], Any]) -> Any:
        """The packed form of ``weight`` for ``layout``, from ``pack()`` if it is not there yet."""
        version = 0 if weight.is_inference() else weight._version
        known_version, layouts = self._packed.get(weight, (version, {}))
        if known_version != version:
            layouts = {}
        if layout not in layouts:
            layouts[layout] = pack()
            self._packed[weight] = (version, layouts)
        return layouts[layout]
