"""Parts of plans as text that fits in a line: no tensor is printed, no long mapping is spelled out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

SHOWN = 6
"""Entries of a list that are spelled out."""


def tensor_text(tensor: Tensor) -> str:
    """``float32 [8] in [0.01, 0.2]``."""
    shape = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    if not tensor.numel() or tensor.is_meta:
        return shape
    return f"{shape} in [{float(tensor.min()):.4g}, {float(tensor.max()):.4g}]"


def brief(part: Any) -> str:
    """``__repr__`` of the dataclasses of a plan: what differs from the defaults, each field in a few words."""
    told = {f.name: getattr(part, f.name) for f in fields(part)}
    told = {f.name: told[f.name] for f in fields(part) if told[f.name] is not None and told[f.name] != _default(f)}
    return f"{type(part).__name__}({', '.join(f'{name}={_text(value)}' for name, value in told.items())})"


def _default(field: Any) -> Any:
    return field.default if not callable(field.default_factory) else field.default_factory()


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"<{tensor_text(value)}>"
    if isinstance(value, Mapping):
        return (
            f"<{len(value)} entries>" if len(value) > SHOWN else str({k: _Verbatim(_text(v)) for k, v in value.items()})
        )
    if isinstance(value, frozenset | tuple | list):
        return f"({listed(value)})"
    return repr(value)


class _Verbatim(str):
    def __repr__(self) -> str:
        return str(self)


def listed(values: Collection[Any]) -> str:
    """Some values in a line: ``a, b, c and 49 more``; sets in order."""
    ordered = sorted(values) if isinstance(values, frozenset | set) else list(values)
    rest = len(ordered) - SHOWN
    return ", ".join(map(str, ordered[:SHOWN])) + (f" and {rest} more" if rest > 0 else "") if ordered else "none"
