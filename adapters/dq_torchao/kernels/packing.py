"""Weights unpacked and laid out as a kernel wants them: made at first use, kept as long as the weight lives.

A layer holds its weight bit-packed; the plain int8 codes exist only while they are laid out. A laid-out weight is an
opaque oneDNN tensor that can be neither copied nor pickled, so it must not be part of a module. It is kept here, keyed
weakly by the packed weight's identity, and made again when that is changed in place.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dq_plugins.affine import per_row
from dq_plugins.quantized.packing import unpack_bits

StoredWeight = tuple[Tensor, Sequence[int], int, bool, Tensor | None, Tensor | None]
"""A weight as layers store it and operators take it: packed bytes, shape and width of its codes, whether they are the
signs -1 and +1, and its zero points and its group scales if it has any."""


def unpack_codes(
    weight: Tensor,
    shape: Sequence[int],
    bits: int,
    signs: bool,
    zero_point: Tensor | None = None,
    group_scale: Tensor | None = None,
) -> Tensor:
    """Plain int8 codes of a packed weight, less its zero points and times its group scales.

    Args:
        weight: packed.
        shape: of the codes, ``[O, ...]``.
        bits: width.
        signs: whether the codes are -1 and +1.
        zero_point: int32 ``[O]`` or ``[O, P]``, or None; the differences must fit int8.
        group_scale: uint8 ``[O, P]``, or None; so must the products.
    """
    codes = unpack_bits(weight, bits, shape, signs=signs)
    if zero_point is not None:
        codes -= per_row(zero_point.to(torch.int8), codes)
    if group_scale is not None:
        codes *= per_row(group_scale.to(torch.int8), codes)
    return codes


MAX_LAYOUTS = 4
"""Forms of one weight that are kept, the newest: a convolution has one for every image size it has seen."""


class _Entry(NamedTuple):
    weight: weakref.ref[Tensor]
    version: int
    layouts: dict[Hashable, Any]


class PackedWeights:
    """Cache of laid-out weights. A look-up costs a fraction of a microsecond: it happens at every layer of every step.

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
        """The form of ``weight`` for ``layout``, from ``pack()`` if it is not there yet."""
        key, version = id(weight), 0 if weight.is_inference() else weight._version
        entry = self._entries.get(key)
        if entry is None or entry.weight() is not weight or entry.version != version:
            entry = _Entry(weakref.ref(weight, lambda _: self._entries.pop(key, None)), version, {})
            self._entries[key] = entry
        if layout not in entry.layouts:
            entry.layouts[layout] = pack()
            if len(entry.layouts) > MAX_LAYOUTS:
                del entry.layouts[next(iter(entry.layouts))]
        return entry.layouts[layout]

    def share(self, weight: Tensor, successor: Tensor) -> None:
        """Hold the forms of ``weight`` for another tensor, too; a compiled graph may keep the first."""
        for layout, form in self._entries[id(weight)].layouts.items():
            self.get(successor, layout, lambda form=form: form)

    def layouts(self, weight: Tensor) -> Iterator[Any]:
        """Every form of ``weight`` that is held."""
        entry = self._entries.get(id(weight))
        if entry is not None and entry.weight() is weight:
            yield from entry.layouts.values()
