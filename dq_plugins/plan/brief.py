"""Plans and their parts as text that fits on a screen: no tensor is printed, no long mapping is spelled out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from dq_plugins.plan.quant_plan import QuantPlan

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


def summary(plan: QuantPlan) -> str:
    """A plan on a screen: model, recipe, schedule, groups, layers by width and why, and what else it decides."""
    t = plan.targets
    target = f"W{t.weight_bits}A{t.act_bits or 32}, first and last layers at least {t.edge_bits} bits"
    visited = f", sampling visits {len(plan.sampling)}" if plan.sampling is not None else ""
    first, last = plan.schedule.timesteps[0], plan.schedule.timesteps[-1]
    lines = [
        f"QuantPlan for {plan.model}: recipe {plan.recipe!r}, seed {plan.seed}, target {target}",
        f"  schedule: {len(plan.schedule)} timesteps from {first:g} to {last:g}{visited}",
        f"  groups:   {listed([f'{name} ({len(groups)})' for name, groups in plan.groups.items()])}",
        f"  passes:   {', '.join(each.name for each in plan.passes) or 'none'}",
        f"  layers:   {len(plan.layers)}",
        *(f"    {line}" for line in _layers(plan)),
        *(f"  {line}" for line in _others(plan)),
    ]
    return "\n".join(lines)


def _layers(plan: QuantPlan) -> Iterable[str]:
    """A line for each width: how many layers have it, and why they are not quantized further."""
    for width, count in Counter(layer.width for layer in plan.layers.values()).most_common():
        reasons = Counter(layer.why for layer in plan.layers.values() if layer.width == width and layer.why)
        why = [f"{text} ({n})" if n < count else text for text, n in reasons.most_common()]
        yield f"{count:>4} {width}" + (f": {listed(why)}" if why else "")


def _others(plan: QuantPlan) -> Iterable[str]:
    found = {feature: f"{len(layers)} layers" if layers else "yes" for feature, layers in plan.features.items()}
    if plan.temporal_table is not None:
        found["temporal_table"] = f"{len(plan.temporal_table.layers)} layers"
    if plan.outlier_rows:
        found["outlier_rows"] = f"{len(plan.outlier_rows)} layers"
    if plan.sensitivity is not None:
        found["sensitivity"] = f"{len(plan.sensitivity.noise)} layers"
    if found:
        yield f"also:     {', '.join(f'{what} ({how})' for what, how in found.items())}"
    if plan.sections:
        yield f"sections: {listed(plan.sections)}"
