"""A plan on a screen: model, recipe, schedule, groups, layers and attentions by width and why, and whatever else.

`QuantPlan` shows itself with these functions, so they cannot name its class: an import would go in a circle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from dq_plugins.notebook import html_table
from dq_plugins.plan.brief import listed


def overview(plan: Any) -> str:
    """A plan as text of a few lines."""
    facts = [f"  {name + ':':<10}{value}".rstrip() for name, value in _facts(plan)]
    layers = [f"    {n:>4} {what}" for n, what in _widths(plan)]
    others = [f"  {name + ':':<10}{value}" for name, value in _others(plan)]
    return "\n".join([_title(plan), *facts, *layers, *others])


def overview_html(plan: Any) -> str:
    """The same for a notebook."""
    layers = [("", f"{n} {what}") for n, what in _widths(plan)]
    return html_table((), [*_facts(plan), *layers, *_others(plan)], _title(plan))


def _title(plan: Any) -> str:
    t = plan.targets
    target = f"W{t.weight_bits}A{t.act_bits or 32}, first and last layers at least {t.edge_bits} bits"
    return f"QuantPlan for {plan.model}: recipe {plan.recipe!r}, seed {plan.seed}, target {target}"


def _facts(plan: Any) -> Iterator[tuple[str, str]]:
    visited = f", sampling visits {len(plan.sampling)}" if plan.sampling is not None else ""
    first, last = plan.schedule.timesteps[0], plan.schedule.timesteps[-1]
    yield "schedule", f"{len(plan.schedule)} timesteps from {first:g} to {last:g}{visited}"
    yield "groups", listed([f"{name} ({len(groups)})" for name, groups in plan.groups.items()])
    yield "passes", ", ".join(each.name for each in plan.passes) or "none"
    if plan.tracer:
        yield "traced", f"by {plan.tracer}"
    yield "layers", str(len(plan.layers))


def _widths(plan: Any) -> Iterator[tuple[int, str]]:
    """For each width: how many layers, then attentions, have it, and why they are not quantized further."""
    for what, sites in (("", plan.layers.values()), ("attention ", plan.attention.values())):
        for width, count in Counter(site.width for site in sites).most_common():
            reasons = Counter(site.why for site in sites if site.width == width and site.why)
            why = [f"{text} ({n})" if n < count else text for text, n in reasons.most_common()]
            yield count, f"{what}{width}" + (f": {listed(why)}" if why else "")


def _others(plan: Any) -> Iterator[tuple[str, str]]:
    found = {feature: f"{len(layers)} layers" if layers else "yes" for feature, layers in plan.features.items()}
    if plan.tabulated:
        found["temporal_table"] = f"{len(plan.tabulated)} layers"
    if plan.outlier_rows:
        found["outlier_rows"] = f"{len(plan.outlier_rows)} layers"
    if plan.sensitivity is not None:
        found["sensitivity"] = f"{sum(name in plan.layers for name in plan.sensitivity.noise)} layers"
    if plan.sampler_correction is not None:
        found["sampler_correction"] = f"{len(plan.sampler_correction.timesteps)} steps"
    if found:
        yield "also", ", ".join(f"{what} ({how})" for what, how in found.items())
    if plan.sections:
        yield "sections", listed(plan.sections)
