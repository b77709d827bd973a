"""Layers that share an input and its parameters (query, key, value) share its codes, in eager mode.

Their weights are not put side by side for one product: three products take as long as one (`benchmarks.shared_inputs`),
and their results would no longer be contiguous. What is saved is quantizing the same tensor three times. In a graph for
inference `dq_torchao.columns` and `dq_torchao.kernels.equals` see to it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dq_plugins.timesteps.selection import Selection

LAST = "last codes"
Codes = TypeVar("Codes")
"""A tensor, or with ranges that are found beside them, those as well."""


class _Codes(NamedTuple):
    of: weakref.ref[Tensor]
    version: int
    key: Hashable
    codes: Any


def shared_codes(
    selection: Selection | None, x: Tensor, key: Hashable, make: Callable[[], Codes], slot: str = LAST
) -> Codes:
    """Codes of ``x``: of the layer before if it had the same input, unchanged since, and the same parameters.

    Args:
        selection: of the running call; None where none runs, and nothing is shared.
        x: the input.
        key: what the codes depend on beside the input; None: they are not shared.
        make: makes them.
        slot: where they are remembered; what else layers share of an input has a slot of its own.
    """
    if key is None or selection is None or torch.compiler.is_compiling() or x.is_inference():
        return make()
    last: _Codes | None = selection.per_call.get(slot)
    if last is not None and last.of() is x and last.version == x._version and last.key == key:
        return last.codes
    codes = make()
    selection.per_call[slot] = _Codes(weakref.ref(x), x._version, key, codes)
    return codes


class ParameterKey:
    """The values of a layer's parameters as something to compare, read once and again when they have changed."""

    def __init__(self) -> None:
        self._seen: Any = None
        self._key: Hashable = None

    def of(self, *parameters: Tensor | None) -> Hashable:
        """The key; None where the parameters do not say when they change, or lie on an accelerator."""
        if any(p is not None and (p.is_inference() or p.device.type != "cpu") for p in parameters):
            return None
        seen = [(id(p), 0 if p is None else p._version) for p in parameters]
        if seen != self._seen:
            self._key = tuple(b"" if p is None else p.detach().contiguous().numpy().tobytes() for p in parameters)
            self._seen = seen
        return self._key

    def __deepcopy__(self, memo: object) -> ParameterKey:
        return ParameterKey()

    def __reduce__(self) -> tuple[type[ParameterKey], tuple[()]]:
        return ParameterKey, ()
