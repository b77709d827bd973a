"""What differs between two plans, as data and as text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, equal

from dq_plugins.plan.layers import LayerPlan
from dq_plugins.plan.plan import QuantPlan


@dataclass(frozen=True)
class Difference:
    """One difference: where, and its two sides as text."""

    where: str
    left: str
    right: str


def _tensor_text(tensor: Tensor | None) -> str:
    if tensor is None:
        return "none"
    values = tensor.float()
    return f"{list(tensor.shape)} in [{values.min():.4g}, {values.max():.4g}]" if tensor.numel() else "empty"


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and equal(a, b)


def _layer(name: str, a: LayerPlan, b: LayerPlan) -> list[Difference]:
    found = []
    if a.width != b.width:
        found.append(Difference(f"{name}: width", a.width, b.width))
    if a.weight and b.weight and a.weight.scheme != b.weight.scheme:
        found.append(Difference(f"{name}: weight scheme", a.weight.scheme, b.weight.scheme))
    if a.kept != b.kept:
        found.append(Difference(f"{name}: in full precision because", a.kept or "-", b.kept or "-"))
    for quantizer, parts in (
        ("weight", ("scale", "zero_point", "codes")),
        ("activation", ("scale", "zero_point")),
    ):
        left, right = getattr(a, quantizer), getattr(b, quantizer)
        if left is None or right is None:
            continue
        for part in parts:
            x, y = getattr(left, part), getattr(right, part)
            if not _same(x, y):
                found.append(Difference(f"{name}: {quantizer} {part}", _tensor_text(x), _tensor_text(y)))
    if a.activation and b.activation and a.activation.groups != b.activation.groups:
        found.append(Difference(f"{name}: groups", a.activation.groups, b.activation.groups))
    return found


def diff_plans(left: QuantPlan, right: QuantPlan) -> list[Difference]:
    """Every difference between two plans; empty means equal in all they decide."""
    found = [
        Difference(field, str(getattr(left, field)), str(getattr(right, field)))
        for field in ("model", "model_hash", "timestep_argument", "schedule", "sampling", "recipe", "seed")
        if getattr(left, field) != getattr(right, field)
    ]
    passes = [[f"{p.name} {dict(p.options)}" for p in plan.passes] for plan in (left, right)]
    if passes[0] != passes[1]:
        found.append(Difference("passes", "; ".join(passes[0]), "; ".join(passes[1])))
    for name in sorted(left.groups.keys() | right.groups.keys()):
        a, b = left.groups.get(name), right.groups.get(name)
        if a != b:
            found.append(Difference(f"groups {name}", str(a and a.edges), str(b and b.edges)))
    for name in sorted(left.layers.keys() | right.layers.keys()):
        a, b = left.layers.get(name), right.layers.get(name)
        if a is None or b is None:
            found.append(Difference(f"{name}: listed", "yes" if a else "no", "yes" if b else "no"))
        else:
            found += _layer(name, a, b)
    for name in sorted(left.sections.keys() | right.sections.keys()):
        a, b = left.sections.get(name), right.sections.get(name)
        if a is None or b is None or a.data != b.data or a.critical != b.critical:
            found.append(Difference(f"section {name}", str(a and a.data)[:80], str(b and b.data)[:80]))
            continue
        for key in sorted(a.tensors.keys() | b.tensors.keys()):
            if not _same(a.tensors.get(key), b.tensors.get(key)):
                found.append(
                    Difference(
                        f"section {name}: {key}",
                        _tensor_text(a.tensors.get(key)),
                        _tensor_text(b.tensors.get(key)),
                    )
                )
    return found
