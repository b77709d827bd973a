"""What differs between two plans, as data and as text: their records compared part by part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, equal

from dq_plugins.artifact.codec import encode
from dq_plugins.notebook import html_table
from dq_plugins.plan.brief import tensor_text
from dq_plugins.plan.quant_plan import QuantPlan

LONGEST = 200
"""Characters of a value that a difference shows."""


@dataclass(frozen=True)
class Difference:
    """One difference: where, such as ``layers.up.conv.weight.scale``, and its two sides as text."""

    where: str
    left: str
    right: str


class Differences(list[Difference]):
    """The differences of two plans, which print themselves and show themselves in a notebook."""

    def __str__(self) -> str:
        return "\n".join(f"{d.where}\n  - {d.left}\n  + {d.right}" for d in self) or "the plans are equal"

    def _repr_html_(self) -> str:
        rows = [[d.where, d.left, d.right] for d in self]
        return html_table(["where", "left", "right"], rows) if self else "<p>the plans are equal</p>"


def diff_plans(left: QuantPlan, right: QuantPlan) -> Differences:
    """Every difference between two plans; empty means equal in all they decide."""
    return Differences(_differences("", _parts(left), _parts(right)))


def _parts(plan: QuantPlan) -> Any:
    """The record of a plan, with the tensors in place of their names."""
    tensors: dict[str, Tensor] = {}

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(each) for key, each in value.items()}
        return tensors.get(value, value) if isinstance(value, str) else value

    return filled(encode(plan, "", tensors))


def _differences(where: str, a: Any, b: Any) -> Iterator[Difference]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from _differences(f"{where}.{key}" if where else key, a.get(key), b.get(key))
    elif not _same(a, b):
        yield Difference(where, _text(a), _text(b))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and equal(a, b)
    return type(a) is type(b) and a == b


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return tensor_text(value)
    text = "-" if value is None else "; ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
