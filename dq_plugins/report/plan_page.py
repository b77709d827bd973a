"""The page that explains a plan."""

from __future__ import annotations

from collections import Counter

from dq_plugins import registry
from dq_plugins.plan import QuantPlan
from dq_plugins.report.page import Page
from dq_plugins.report.table import Table


def width_table(plan: QuantPlan) -> Table:
    """How many layers have which widths, and why some stay in full precision; most layers first."""
    counts = Counter((layer.width, layer.why) for layer in plan.layers.values())
    return Table(["layers", "width", "why not quantized"], [[n, *key] for key, n in counts.most_common()])


def add_decisions(page: Page, plan: QuantPlan) -> None:
    """Everything the plan decided: timesteps, groups, what its passes draw, layers and attentions."""
    if plan.sampling is not None:
        page.heading("Sampling")
        page.text(f"{len(plan.sampling)} timesteps: {', '.join(f'{t:g}' for t in plan.sampling.timesteps)}.")
    if plan.groups:
        page.heading("Timestep groups")
        rows = [[name, len(g), ", ".join(f"{e:g}" for e in g.edges) or "-"] for name, g in plan.groups.items()]
        page.table(Table(["name", "groups", "edges"], rows))
    for name in dict.fromkeys(each.name for each in plan.passes):
        add_figure(page, plan, name)
    page.heading("Layers")
    page.table(width_table(plan))
    rows = [
        [name, layer.kind, ", ".join(sorted(layer.roles)), layer.width, layer.why]
        for name, layer in plan.layers.items()
    ]
    page.table(Table(["layer", "kind", "roles", "width", "why not quantized"], rows), folded=f"all {len(rows)} layers")
    if plan.attention:
        page.heading("Attention")
        rows = [[name, attention.width, attention.why] for name, attention in plan.attention.items()]
        page.table(Table(["attention", "width", "why not quantized"], rows))


def add_figure(page: Page, plan: QuantPlan, name: str) -> None:
    """What the pass ``name`` draws of its decisions; a pass that is not installed or fails leaves a note."""
    if name not in registry.names("pass"):
        page.note(f"The pass {name} is not installed here: if it draws a figure, it is missing.")
        return
    try:
        drawn = registry.get("pass", name).figure(plan)
    except Exception as error:  # of a third party's pass, or of one written for another version: the page goes on
        page.note(f"The figure of the pass {name} is missing: {type(error).__name__}: {error}")
        return
    if drawn is not None:
        page.heading(f"What {name} found")
        page.figure(*drawn)


def plan_page(plan: QuantPlan) -> Page:
    """A page with everything the plan decided."""
    page = Page(f"Plan for {plan.model}")
    page.text(
        f"Recipe {plan.recipe!r}, seed {plan.seed}, {len(plan.schedule)} timesteps from {plan.schedule.timesteps[0]:g} "
        f"to {plan.schedule.timesteps[-1]:g}. Plan hash {plan.hash[:16]}, weights hash {plan.model_hash[:16]}."
    )
    page.table(Table(["pass", "options"], [[p.name, str(dict(p.options))] for p in plan.passes]))
    add_decisions(page, plan)
    return page
