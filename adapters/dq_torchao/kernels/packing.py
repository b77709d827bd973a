"""Weights repacked into the layout a kernel wants: made at first use, kept as long as the weight lives.

A packed weight is an opaque oneDNN tensor that can be neither copied nor pickled, so it must not be part of a module.
It is kept here, keyed weakly by the weight's identity, and made again when the weight is changed in place.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from torch import Tensor


class _Entry(NamedTuple):
    weight: weakref.ref[Tensor]
    version: int
    layouts: dict[Hashable, Any]


class PackedWeights:
    """Cache of packed weights. A look-up costs a fraction of a microsecond: it happens at every layer of every step.

    Example:
        >>> import torch
        >>> cache, weight = PackedWeights(), torch.ones(3)
        >>> cache.get(weight, "layout", lambda: "packed") is cache.get(weight, "layout", lambda: "again")
        True
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, weight: Tensor, layout: Hashable, pack: Callable[[], Any]) -> Any:
        """The packed form of ``weight`` for ``layout``, from ``pack()`` if it is not there yet."""
        key, version = id(weight), 0 if weight.is_inference() else weight._version
        entry = self._entries.get(key)
        if entry is None or entry.weight() is not weight or entry.version != version:
            entry = _Entry(weakref.ref(weight, lambda _: self._entries.pop(key, None)), version, {})
            self._entries[key] = entry
        if layout not in entry.layouts:
            entry.layouts[layout] = pack()
        return entry.layouts[layout]
